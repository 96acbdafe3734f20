"""States of our jobs from Slurm's controller, without an accounting database. Flows in: run folders or job ids; out: states.

`scontrol show job` knows a job while it is in the queue, and for some minutes after its end (MinJobAge). A job is recognised by
the file it prints to, which lies in its run folder: nothing has to be stored, and reused job ids do no harm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
_SECONDS = 60
"""Most that one of Slurm's commands may take: a controller that is starting again answers late."""


class NoAnswerError(RuntimeError):
    """The controller does not answer, or refuses; it may be starting again."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the controller sees it."""

    job_id: str
    state: str
    """RUNNING, PENDING ...; GONE: Slurm no longer knows it."""
    reason: str
    """Why the job waits."""
    exit_code: int
    """Exit code of the batch script; 128 and more: ended by a signal."""
    restarts: int
    output: str
    """The file it prints to."""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED or self.state == "GONE"

    @property
    def is_good(self) -> bool:
        """Whether it ended well."""
        return self.state == "COMPLETED"


def parse_jobs(text: str) -> list[Job]:
    """The jobs of `scontrol show job --oneliner`."""
    jobs = []
    for line in text.splitlines():
        first = re.match(r"JobId=(\d+) ", line)
        # Fields in which anybody may write anything come behind these, but for the name, which comes before them.
        known = dict(re.findall(r" (JobState|Reason|ExitCode|Restarts)=(\S+)", line.split(" Command=")[0]))
        if first and "JobState" in known:
            code, signal = (int(number) for number in known.get("ExitCode", "0:0").split(":"))
            output = re.search(r" StdOut=(.*?)(?: Power=| [A-Z]\w*=|$)", line)
            jobs.append(
                Job(
                    job_id=first[1],
                    state=known["JobState"],
                    reason=known.get("Reason", "None"),
                    exit_code=128 + signal if signal else code,
                    restarts=int(known.get("Restarts", 0)),
                    output=output[1] if output else "",
                )
            )
    return jobs


def show(job_id: str | None = None) -> list[Job]:
    """One job, or all that the controller knows. Raises: NoAnswerError."""
    done = _ask("scontrol", "show", "job", "--oneliner", *([] if job_id is None else [job_id]))
    if done.returncode and job_id is not None and "Invalid job id" in done.stderr:
        return []
    if done.returncode:
        raise NoAnswerError(f"Slurm does not answer: {' '.join(done.stderr.split())}")
    return parse_jobs(done.stdout)


def jobs_of(folder: Path) -> list[Job]:
    """The jobs that print into a folder and have not ended, oldest first."""
    found = [job for job in show() if Path(job.output).parent == folder and not job.has_ended]
    return sorted(found, key=lambda job: int(job.job_id))


def cancel(job_id: str) -> None:
    """End a job, running or waiting. Raises: NoAnswerError if Slurm refuses."""
    done = _ask("scancel", job_id)
    if done.returncode:
        raise NoAnswerError(f"job {job_id} could not be cancelled: {' '.join(done.stderr.split())}")


def _ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"Slurm does not answer: {command[0]} has waited for {_SECONDS} s") from error


def check_here() -> None:
    """Raises: ValueError where Slurm's commands are not installed."""
    missing = [name for name in ("sbatch", "srun", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not found: this is no machine of a Slurm cluster; --executor local runs the stages here"
        )


def check_script(name: str, text: str) -> None:
    """Ask the controller whether a stage's batch script could ever run; nothing is submitted.

    Raises: ValueError with its answer.
    """
    done = _ask("sbatch", "--test-only", text=text)
    if done.returncode:
        lines = [line.split(": ", 1)[-1].strip() for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"{name}: Slurm refuses: {'; '.join(dict.fromkeys(lines)) or f'sbatch left with {done.returncode}'}")
