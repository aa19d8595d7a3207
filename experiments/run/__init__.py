"""Where stages run: this machine, SLURM, one worker process for each folder."""
