"""Checks of the machine: what is installed, what computes, what room there is."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from client.site.model.files import locate
from common.study import Study
from common.systems import SYSTEMS
from deploy.site.doctor.visit import CheckFailed, CheckWarning, Visit
from simulations import bundle

_GIB = 2**30
_DISK_LEAST, _DISK_GOOD = 1 * _GIB, 10 * _GIB


def versions(visit: Visit) -> str:
    here = {"fedward": version("fedward"), "flwr": version("flwr")}
    try:
        here["torch"] = version("torch")
    except PackageNotFoundError:
        raise CheckFailed(
            "torch is not installed", cure="install fedward with the extra `site`"
        ) from None
    pinned = next(r for r in requires("fedward") or () if r.startswith("flwr=="))
    if pinned != f"flwr=={here['flwr']}":
        raise CheckFailed(f"flwr {here['flwr']} is installed, not {pinned}", cure="install it")
    wanted = visit.invite.version
    if wanted != here["fedward"]:
        raise CheckWarning(
            f"fedward {here['fedward']} is installed, the invite was made with {wanted}",
            cure="make sure that the coordinator runs the same version by now",
        )
    python = ".".join(str(part) for part in sys.version_info[:3])
    return ", ".join([f"python {python}", *(f"{name} {v}" for name, v in here.items())])


def pinned_bundle(visit: Visit) -> str:
    here, pinned = bundle.sha256(), visit.relay.bundle
    if here != pinned:
        raise CheckFailed(
            f"the relay may run code {pinned[:16]}…, but this version's is {here[:16]}…",
            cure="after an upgrade: `fedward site upgrade FOLDER`; otherwise the installation was "
            "changed: install it again",
        )
    return f"code {here[:16]}… is the one that the relay may run"


def gpu(visit: Visit) -> str:
    import torch

    asked = visit.config.device if visit.config else None
    available = torch.cuda.is_available()
    if asked and asked.startswith("cuda") and not available:
        raise CheckFailed(
            f"site.toml asks for {asked}, and torch finds no GPU",
            cure='install the driver and a torch with CUDA, or set device = "cpu"',
        )
    if not available or asked == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        fits = _fits(visit.study, memory, memory, 4)
        if asked != "cpu":
            raise CheckWarning(
                f"no GPU: the processor computes{fits}", cure="fine for small models"
            )
        return f"the processor computes, as site.toml says{fits}"
    device = torch.device(asked or "cuda")
    try:
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckFailed(
            f"{device} cannot be used: {str(error).splitlines()[0]}",
            cure="`nvidia-smi` lists the GPUs; choose one with `device` in site.toml",
        ) from None
    name = torch.cuda.get_device_name(device)
    fits = _fits(visit.study, total, free, 2)
    return f"{name}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free{fits}"


def _fits(study: Study | None, total: int, free: int, width: int) -> str:
    """Whether the study's SLM fits. `width`: bytes of a weight, bf16 on a GPU, fp32 elsewhere."""
    if study is None or not SYSTEMS[study.model.system].has_slm:
        return ""
    files = locate(study.model.slm, study.model.revision)
    if files is None:
        raise CheckWarning(
            f"the study's model '{study.model.slm}' is not on this machine",
            cure=f"hf download {study.model.slm} --revision {study.model.revision}, as the "
            "daemon's user",
        )
    needed = files.parameters * width
    said = f"; the weights of '{study.model.slm}' take {needed / _GIB:.2f} GiB"
    if needed > total:
        raise CheckFailed(
            f"{said[2:]}, the memory is {total / _GIB:.1f} GiB",
            cure="choose a larger GPU, or a study with a smaller model",
        )
    if 1.5 * needed > free:  # activations and gradients of the adapter come on top
        raise CheckWarning(
            f"{said[2:]}, {free / _GIB:.1f} GiB are free", cure="end what else uses the memory"
        )
    return said


def disk(visit: Visit) -> str:
    free = shutil.disk_usage(visit.folder.state).free
    text = f"{free / _GIB:.1f} GiB free for {visit.folder.state}"
    if free < _DISK_LEAST:
        raise CheckFailed(text, cure="make room: a charge that cannot be written is not released")
    if free < _DISK_GOOD:
        raise CheckWarning(text, cure="embeddings of a large hospital take more; make room")
    return text
