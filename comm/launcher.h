// --gpus N without another launcher: this process starts N of itself, one per GPU, and looks after them.
#pragma once

// Starts `processes` copies of the running program with the same arguments and, in their environment, what world_from_environment reads; passes SIGINT
// and SIGTERM on to them, and returns the exit code for main when all have ended: 0 if all ended with 0, else the first failure's (128 + n for
// signal n). Should one end otherwise than with 0, the others get `grace_seconds` to end by themselves (comm/control.h tells them) before they are
// terminated and at last killed. Says on stderr what happened only where no process can have said it: every one of them was killed.
// The children are sent SIGTERM if this process dies. Throws UserError if a process cannot be started.
int launch_processes(int processes, char** argv, double grace_seconds);
