"""The exit codes of `genscale train`, for whoever starts it: a scheduler's script, a shell, a person.

    0        done: every step up to train.steps
    1        an error of ours, with its traceback
    2        a user's mistake, a run that went wrong (a loss that is no number, a collapse, a reward that fails), or data or a
             reward whose server is down, with one line that says what
    75       ended by the watchdog: no progress for guards.hang_minutes. Start it again, and it goes on
    130, 143, 138, 129    stopped by SIGINT, SIGTERM, SIGUSR1 or SIGHUP (128 + its number; SIGHUP: the terminal is gone): the
             last step done is in a checkpoint on disk, or no step was done since the start. Start it again, and it goes on
    128 + n  a process was ended by signal n, which it could not answer (137: SIGKILL, by a person or for want of memory)

`genscale train` and `genscale train --processes N` end with these codes. `accelerate launch` and torchrun do not pass them on:
they end with 1 whatever a process ended with, and die of SIGUSR1 themselves. So the run folder says the same in `ended.json`
(`how`: complete, stopped, failed, lost, hang or unfit; `signal`, `step`, `exit_code`, and the `time` in UTC), which is removed
when the run starts again; where there is none, the run goes on, or was killed outright. `lost`: another process of the run was
killed, its machine is gone, the server of its data or of a reward does not answer, the port where the processes meet is taken,
or the last checkpoint, or a reward that is written down before it is used, found no room on the disk. `unfit`: the node has no
GPU for a process that Slurm gave one.

A job of Slurm ends with 0 where its run is complete, and else with the exit code of its run's last life (under a launcher, its
processes end with 0 after a signal, which is no failure that the launcher should act upon). In its script,
`genscale slurm begin` ends with 0 for the training to start, 10 where the run is complete, 11 where a node is not fit, 12 where
the run folder cannot be written; `genscale slurm lost` says `lost` for a process that was killed, if nobody else has said how
the life ended; and `genscale slurm end` ends with 75 for the job to be requeued, else with the exit code of the job. It is
requeued after a signal, a hang, a crash, the loss of a node or of the data's server, or a full disk where there is a
checkpoint, unless three lives in a row have brought no new checkpoint; not after a user's mistake (2).
"""

DONE = 0
OUR_ERROR = 1
USER_ERROR = 2
HANG = 75
"""EX_TEMPFAIL of sysexits.h: try again."""


def of_signal(number: int) -> int:
    """The exit code of what a signal has stopped, as shells have it."""
    return 128 + number
