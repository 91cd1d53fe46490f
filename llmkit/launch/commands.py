"""The commands of launchers: the scripts in `launch/`, with what a job says."""

from __future__ import annotations

from pathlib import Path

from llmkit.core.errors import RecipeError
from llmkit.launch.job import Job, check_hosts


def hosts(job: Job, engine: str, scripts: Path) -> list[str]:
    """Of torchrun and deepspeed: ssh to the hosts of a hostfile, or this host's part alone.

    Raises:
        RecipeError: the hosts are not named, or do not suffice.
    """
    if job.hostfile and job.node_rank is not None:
        raise RecipeError("--hostfile starts every host, and --node-rank one of them", fix="give one of the two")
    if job.nodes > 1 and not job.hostfile and (job.node_rank is None or not job.master):
        fix = "give --hostfile, or start each host with its --node-rank and one --master"
        raise RecipeError(f"{job.nodes} nodes and no hostfile", fix=fix)
    if job.node_rank is not None and not 0 <= job.node_rank < job.nodes:
        raise RecipeError(f"--node-rank {job.node_rank} of {job.nodes} nodes", fix=f"use 0 to {job.nodes - 1}")
    if engine == "deepspeed" and job.restarts:
        raise RecipeError("deepspeed starts no ranks again", fix="drop --restarts, or use --engine torchrun")
    if job.hostfile:
        check_hosts(job)
    given: dict[str, object] = {"--hostfile": job.hostfile, "--master": job.master, "--interface": job.interface}
    given |= {"--node-rank": "" if job.node_rank is None else job.node_rank, "--restarts": job.restarts or ""}
    said = [word for name, value in given.items() if value != "" for word in (name, str(value))]
    sizes = ["--nodes", str(job.nodes), "--gpus", str(job.gpus), "--port", str(job.port)]
    return ["bash", str(scripts / f"{engine}.sh"), *sizes, *said, *job.words]


def slurm(job: Job, scripts: Path) -> list[str]:
    """Of Slurm's sbatch: one task a rank."""
    ask = ["sbatch", "--job-name", job.label, "--nodes", str(job.nodes), "--ntasks-per-node", str(job.gpus)]
    ask += [] if job.cpu else ["--gpus-per-node", str(job.gpus)]
    ask += ["--time", job.time] if job.time else []
    said = {"INTERFACE": job.interface, "RESTARTS": "" if job.restarts is None else str(job.restarts)}
    names = [f"{name}={value}" for name, value in said.items() if value]
    ask += ["--export", ",".join(["ALL", *names])] if names else []
    return [*ask, *job.options, str(scripts / "slurm.sh"), *job.words]
