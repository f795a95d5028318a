"""Runs of studies: submitting, following, stopping, resuming, and taking the results away.

A run is a folder `runs/RUN`: `study.toml` with `study.sig`, `flower.json` (Flower's number of it),
and what the ServerApp writes there. Its outcome is what lies in the folder; Flower's own word is
asked only where the ServerApp left none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.files import write_atomically
from common.study import Name, Study, resolve
from deploy.coordinator.enrol import Register
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder
from deploy.coordinator.superlink import SuperLink
from deploy.enrolment import StudySignature
from server.start import started
from simulations import bundle

RESULTS = ("report.json", "rounds.jsonl", "study.toml", "study.sig", "adapter", "events")
CHECKSUMS = "SHA256SUMS"
_NOTICE_SECONDS = 90.0  # Flower takes about 60 to miss a ServerApp that died


@dataclass(frozen=True)
class Outcome:
    """How a run stands.

    Attributes:
        state: `completed`, `failed`, `stopped`, `interrupted` (it can be resumed), `waiting`,
            `running`, or `unknown` while no SuperLink can be asked.
        phase: `starting`, `train` or `evaluate`: what its last line says.
        completed: Rounds that were aggregated.
        rounds: Of the study.
        detail: Reason of a failure, or what the last line says of missing sites.
    """

    run: str
    study: str
    state: str
    phase: str
    completed: int
    rounds: int
    detail: str


def submit(
    folder: CoordinatorFolder,
    study: str | Path,
    *,
    run: str | None = None,
    start: Path | None = None,
) -> str:
    """Pins the hospitals' keys in the study, signs it, and has the SuperLink run it.

    Args:
        study: A TOML file or the name of a ready study.
        run: Name of the run; by default study and time.
        start: Folder of the published adapter that the study starts from.

    Returns:
        The run's name.

    Raises:
        FedwardError: The study, a site that is not enrolled, or the SuperLink; nothing runs.
    """
    begun = start.expanduser().absolute() if start else None
    settled = _settled(folder, study, begun)
    name = run or f"{settled.name[:40]}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise CoordinatorError(
            f"'{name}' is no name for a run", cure="use letters, digits, dots, hyphens"
        ) from None
    out = folder.runs / name
    try:
        out.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise CoordinatorError(
            f"there is a run '{name}' already",
            cure=f"`resume {name}` goes on with it; or choose another --run-id",
        ) from None
    try:
        sign(folder, settled, out)
        if begun is not None:
            (out / "start").symlink_to(begun, target_is_directory=True)
        _start(folder, name, resume=False)
    except BaseException:
        shutil.rmtree(out)  # nothing of it ran
        raise
    return name


def settle(
    folder: CoordinatorFolder, study: str | Path, out: Path, *, start: Path | None = None
) -> Study:
    """Writes the study as it would be submitted, with its signature, for hospitals to approve.

    Args:
        out: New folder, which receives `study.toml` and `study.sig`.

    Raises:
        FedwardError: The study, or a site that is not enrolled; nothing is written.
    """
    settled = _settled(folder, study, start.expanduser().absolute() if start else None)
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise CoordinatorError(f"{out} exists already", cure="name a new folder") from None
    sign(folder, settled, out)
    return settled


def _settled(folder: CoordinatorFolder, study: str | Path, start: Path | None) -> Study:
    chosen, _ = started(Study.load(study), start)
    return resolve(pinned(chosen, Register.read(folder)))


def pinned(study: Study, register: Register) -> Study:
    """The study with each site's identity key in its roster.

    Raises:
        StudyError: A site is not enrolled.
        CoordinatorError: The study pins another key than the site was enrolled with.
    """
    raw = study.model_dump(mode="json")
    for name, site in study.federation.sites.items():
        key = register.site(name).request.identity
        if site.public_key not in (None, key):
            raise CoordinatorError(
                f"the study pins another key for site '{name}' than it was enrolled with",
                cure=f"take federation.sites.{name}.public_key out of the study",
            )
        raw["federation"]["sites"][name]["public_key"] = key
    return Study.model_validate(raw)


def sign(folder: CoordinatorFolder, study: Study, out: Path) -> None:
    """Writes `study.toml` and `study.sig`, which people at the hospitals check before approval."""
    identity = folder.identity()
    write_atomically(out / "study.toml", study.to_toml())
    StudySignature(study=study.hash, coordinator=identity.public).write(out / "study.sig", identity)


def resume(folder: CoordinatorFolder, run: str) -> None:
    """Goes on with a run that failed, was stopped, or lost its SuperLink or ServerApp.

    Waits until Flower has noticed that the old ServerApp is dead: two at once would ask the
    hospitals the same rounds.

    Raises:
        CoordinatorError: It has completed, or still runs.
    """
    out = _folder(folder, run)
    if (out / "report.json").exists():
        raise CoordinatorError(f"run '{run}' has completed", cure=f"`pull {run} DEST`")
    deadline = time.monotonic() + _NOTICE_SECONDS
    with SuperLink.connected(folder) as superlink:
        while not superlink.states().get(_number(out), "finished").startswith("finished"):
            if time.monotonic() > deadline:
                raise CoordinatorError(
                    f"run '{run}' is still running", cure=f"`stop {run}` first, or let it run"
                )
            time.sleep(1)
    (out / "failed.json").unlink(missing_ok=True)
    _start(folder, run, resume=True)


def stop(folder: CoordinatorFolder, run: str) -> None:
    """Ends a run; what the hospitals were charged stays charged, and `resume` goes on with it."""
    out = _folder(folder, run)
    with SuperLink.connected(folder) as superlink:
        if superlink.states().get(_number(out), "finished").startswith("finished"):
            raise CoordinatorError(f"run '{run}' does not run")
        superlink.stop(_number(out))


def outcomes(folder: CoordinatorFolder) -> list[Outcome]:
    """Every run, in the order of their names."""
    paths = sorted(p for p in folder.runs.iterdir() if (p / "study.toml").is_file())
    states: Mapping[int, str] | None = None
    if folder.served:
        with SuperLink.connected(folder) as superlink:
            states = superlink.states()
    return [_outcome(path, states) for path in paths]


def outcome(folder: CoordinatorFolder, run: str) -> Outcome:
    """How one run stands."""
    _folder(folder, run)
    return next(o for o in outcomes(folder) if o.run == run)


def lines(folder: CoordinatorFolder, run: str) -> list[dict[str, Any]]:
    """The complete lines of a run's rounds.jsonl."""
    return _lines(_folder(folder, run))


def pull(folder: CoordinatorFolder, run: str, dest: Path, *, partial: bool = False) -> list[str]:
    """Copies the results of a run to `dest` with a list of their hashes (`sha256sum -c`).

    Args:
        partial: Also of a run that has not completed: what there is.

    Returns:
        Names of the files.

    Raises:
        CoordinatorError: The run has not completed, or `dest` exists.
    """
    out = _folder(folder, run)
    if not partial and not (out / "report.json").exists():
        raise CoordinatorError(
            f"run '{run}' has not completed: {outcome(folder, run).state}",
            cure="wait, or take what there is with --partial",
        )
    if dest.exists():
        raise CoordinatorError(f"{dest} exists already", cure="name a new folder")
    sums = {}
    for name in RESULTS:
        found = out / name
        for path in sorted(found.rglob("*")) if found.is_dir() else [found]:
            if path.is_file():
                relative = path.relative_to(out)
                (dest / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, dest / relative)
                digest = hashlib.sha256((dest / relative).read_bytes()).hexdigest()
                sums[relative.as_posix()] = digest
    (dest / CHECKSUMS).write_text("".join(f"{digest}  {n}\n" for n, digest in sums.items()))
    return list(sums)


def _start(folder: CoordinatorFolder, run: str, *, resume: bool) -> None:
    """Submits the bundle and notes Flower's number of the run."""
    out = folder.runs / run
    begun = out / "start"
    config: dict[str, str | bool] = {
        "study": str(out / "study.toml"),
        "start": str(begun.resolve()) if begun.exists() else "",
        "out-dir": str(out),
        "run-id": run,
        "resume": resume,
        "coordinator-key": str(folder.key),
    }
    with SuperLink.connected(folder) as superlink:
        number = superlink.start(bundle.packed(), config)
    write_atomically(out / "flower.json", json.dumps({"run": number}))


def _outcome(out: Path, states: Mapping[int, str] | None) -> Outcome:
    study = Study.load(out / "study.toml")
    last: dict[str, Any] = next(reversed(_lines(out)), {})
    missing = {**last.get("refused", {}), **last.get("lost", {})}
    detail = ", ".join(f"without {site} ({code})" for site, code in missing.items())
    if (out / "report.json").exists():
        state = "completed"
    elif (out / "failed.json").exists():
        state, detail = "failed", json.loads((out / "failed.json").read_text())["reason"]
    elif states is None:
        state = "unknown"
    else:
        said = states.get(_number(out), "finished:forgotten")
        state, more = _FLOWER.get(said.partition(" ")[0], "interrupted"), said.partition(" ")[2]
        detail = detail or more
    return Outcome(
        run=out.name,
        study=study.name,
        state=state,
        phase=last.get("kind", "starting"),
        completed=last.get("completed", 0),
        rounds=study.federation.rounds,
        detail=detail,
    )


_FLOWER = {
    "pending": "waiting",
    "starting": "waiting",
    "running": "running",
    "finished:stopped": "stopped",
}
"""What Flower's states mean here; it finished in any other way without a word of the ServerApp."""


def _lines(out: Path) -> list[dict[str, Any]]:
    path = out / "rounds.jsonl"
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def _folder(folder: CoordinatorFolder, run: str) -> Path:
    out = folder.runs / run
    if Path(run).name != run or not (out / "study.toml").is_file():
        known = ", ".join(sorted(p.name for p in folder.runs.iterdir())) or "none"
        raise CoordinatorError(f"there is no run '{run}' (known: {known})")
    return out


def _number(out: Path) -> int:
    try:
        return int(json.loads((out / "flower.json").read_text())["run"])
    except (OSError, ValueError, LookupError):
        return -1
