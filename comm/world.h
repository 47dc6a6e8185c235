// Who takes part in a run: one process per GPU, numbered by rank. Found from what launchers put into the environment.
#pragma once
#include <string>

struct World {
    int rank = 0, size = 1;
    int local_rank = 0;                // among the processes of this machine: the GPU to use, unless the launcher shows each process only its own
    std::string address = "127.0.0.1"; // of rank 0's machine
    int port = 0;                      // on which rank 0 listens (comm/control.h)
    std::string launcher;              // "train_loqt", "torchrun", "mpirun", "srun"; empty: this process is alone

    bool alone() const { return size == 1; }
    bool root() const { return rank == 0; }
    // Whether this process prints what every rank finds out for itself when rank 0 cannot say it: one on each machine, and rank 1.
    bool speaks() const { return rank <= 1 || local_rank == 0; }
};

// From the variables of (first that is complete wins; a size of 1 means alone)
//   train_loqt --gpus, torchrun   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (LOQT_LAUNCHER=train_loqt tells them apart)
//   Open MPI's mpirun             OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
//   MPICH's and Intel's mpirun    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
//   Slurm's srun                  SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID; a batch script without srun is alone
// Rank 0's machine and port: MASTER_ADDR and MASTER_PORT, where set, for all of them. Else
//   mpirun   this machine if all ranks are on it (OMPI_COMM_WORLD_LOCAL_SIZE, MPI_LOCALNRANKS), port 29517
//   srun     the first machine of SLURM_STEP_NODELIST, or this one if it is the only one; port 20000 + SLURM_JOB_ID mod 10000
// torchrun's own store listens on MASTER_PORT (TORCHELASTIC_USE_AGENT_STORE=True): then the port is the next one.
// UserError, naming the variable, for numbers that make no sense, and where the machine of rank 0 is not known.
World world_from_environment();
