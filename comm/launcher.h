// --gpus N without another launcher: this process starts N of itself, one per GPU, and looks after them.
#pragma once

// Starts `processes` copies of the running program with the same arguments and, in their environment, what world_from_environment reads (and
// OMP_NUM_THREADS, where not set: each its share of the cores); passes SIGINT and SIGTERM on to them, and returns the exit code for main when all
// have ended: 0 if all ended with 0, else the first failure's; where that was killed by signal n, the first code of those that told of it, or 128 + n if none did. Should one end otherwise than with 0, the others
// end by themselves (comm/control.h tells them; one that was stopped is woken for it). Who has not after three seconds gets SIGTERM, and `grace_seconds` after that
// SIGKILL. Says on stderr what happened only where no process can have said it: one was killed, and none ended with an exit code that is not 0.
// The children read /dev/null, and are sent SIGTERM if this process dies. Throws UserError if a process cannot be started.
// Called before the first use of a GPU and of threads, from the thread that lives as long as the process.
int launch_processes(int processes, char** argv, double grace_seconds);
