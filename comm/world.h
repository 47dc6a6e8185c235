// Who takes part in a run: one process per GPU, numbered by rank. Found from what launchers put into the environment.
#pragma once
#include <string>

struct World {
    int rank = 0, size = 1;
    int local_rank = 0;                // among the processes of this machine: the GPU to use
    std::string address = "127.0.0.1"; // of rank 0's machine
    int port = 0;                      // on which rank 0 listens (comm/control.h)
    std::string launcher;              // "train_loqt", "torchrun", "mpirun", "srun"; empty: this process is alone

    bool alone() const { return size == 1; }
    bool root() const { return rank == 0; }
};

// From the variables of (first that is complete wins)
//   train_loqt --gpus, torchrun   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
//   Open MPI's mpirun             OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
//   MPICH's and Intel's mpirun    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
//   Slurm's srun                  SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID; rank 0's machine from the node list
// MASTER_ADDR and MASTER_PORT, where set, hold for all of them. UserError for numbers that make no sense together, and where the
// machine of rank 0 is not known and cannot be this one.
World world_from_environment();
