"""Units, images and compose files say what the guides and the security page say of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import grpc
import pytest
import typer.main
import yaml
from flwr.supercore.exit.exit_code import ExitCode

from common.cli import build
from common.identity import open_envelope
from common.messages import Answer, Envelope
from deploy.coordinator.layout import Config, CoordinatorFolder
from deploy.site.layout import SiteFolder

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = REPOSITORY / "deploy" / "files"
UNITS = sorted((FILES / "systemd").glob("*.service"))
DOCKERFILES = sorted((FILES / "containers").glob("Dockerfile.*"))
COMPOSES = sorted((FILES / "containers").glob("compose.*.yaml"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

PROGRAM = "/opt/fedward/bin/fedward"
SITE = SiteFolder(Path("/var/lib/fedward/site"))
COORDINATOR = CoordinatorFolder(Path("/var/lib/fedward/coordinator"))
SHARD = "/srv/fedward/shard"


def name_of(path: Path) -> str:
    return path.name


def needs(program: str) -> str:
    beside = Path(sys.executable).parent  # of the development dependencies
    found = shutil.which(program, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{program} is not on this machine")
    return found


def unit(name: str) -> dict[str, list[str]]:
    """Values of each key of a unit, in their order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (FILES / "systemd" / f"fedward-{name}.service").read_text().splitlines():
        if re.match(r"[A-Z]\w*=", line):
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def words(unit: dict[str, list[str]], key: str) -> set[str]:
    return {word for value in unit.get(key, []) for word in value.split()}


def services(name: str) -> dict[str, dict[str, Any]]:
    text = (FILES / "containers" / f"compose.{name}.yaml").read_text()
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


ALL_SERVICES = [
    pytest.param(service, id=f"{name}-{service_name}")
    for name in ("coordinator", "site")
    for service_name, service in services(name).items()
]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """`rw` or `ro` of each place that a container sees of its host."""
    found = {}
    for volume in service["volumes"]:
        source, target, *mode = volume.split(":")
        assert source == target
        found[source] = mode[0] if mode else "rw"
    return found


# -- commands ---------------------------------------------------------------------------------


def check_command(line: list[str]) -> None:
    """Fails unless `fedward` takes these words: a command, its options, all of its arguments."""
    command: click.Command = typer.main.get_command(build())
    rest = list(line)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            pytest.fail(f"no command {' '.join(line)}")
        command, rest = found, rest[1:]
    try:
        command.make_context(line[-1], rest)
    except click.UsageError as error:
        pytest.fail(f"{' '.join(line)}: {error.format_message()}")


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_the_command_of_a_unit_exists(path: Path) -> None:
    (line,) = unit(path.stem.removeprefix("fedward-"))["ExecStart"]
    program, *rest = shlex.split(line)
    assert program == PROGRAM
    check_command(rest)


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_the_command_of_an_image_exists(path: Path) -> None:
    text = path.read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, flags=re.M)
    (command,) = re.findall(r"^CMD (.+)$", text, flags=re.M)
    assert json.loads(entry) == [PROGRAM]
    check_command(json.loads(command))


@pytest.mark.parametrize("service", ALL_SERVICES)
def test_the_command_of_a_container_exists(service: dict[str, Any]) -> None:
    check_command(service["command"])
    if "healthcheck" in service:
        kind, program, *rest = service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", PROGRAM)
        check_command(rest)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for wrong in (["site", "run", "x"], ["site", "serve"], ["site", "serve", "x", "y"]):
        with pytest.raises(pytest.fail.Exception):
            check_command(wrong)


# -- systemd ----------------------------------------------------------------------------------


def verified(text: str, folder: Path) -> str:
    """What `systemd-analyze verify` has to say of a unit, with this installation's `fedward`."""
    here = Path(sys.executable).with_name("fedward")
    path = folder / "fedward-tried.service"
    path.write_text(text.replace(PROGRAM, str(here)))
    done = subprocess.run(
        [needs("systemd-analyze"), "verify", "--man=no", path], capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_a_unit_is_valid(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert verified(text, tmp_path) == ""
    assert "Unknown key" in verified(text.replace("UMask=", "UMsk="), tmp_path)


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_a_unit_is_hardly_exposed(path: Path) -> None:
    """Measured with systemd 252: daemon 1.0, relay and coordinator 1.4 (0 best, 10 worst)."""
    done = subprocess.run(
        [needs("systemd-analyze"), "security", "--offline=yes", "--no-pager", path],
        capture_output=True,
        text=True,
        check=True,
    )
    (level,) = re.findall(r"Overall exposure level .*: ([\d.]+)", done.stdout)
    assert float(level) <= 1.5


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_a_unit_dumps_nothing_and_gains_nothing(path: Path) -> None:
    found = unit(path.stem.removeprefix("fedward-"))
    assert found["LimitCORE"] == ["0"]
    assert found["UMask"] == ["0077"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["ProtectSystem"] == ["strict"]


def test_the_daemon_has_no_network_and_writes_to_two_folders() -> None:
    daemon = unit("daemon")
    assert daemon["ExecStart"] == [f"{PROGRAM} site serve {SITE.config_file}"]
    assert daemon["PrivateNetwork"] == ["yes"]
    assert words(daemon, "RestrictAddressFamilies") == {"AF_UNIX"}
    assert words(daemon, "ReadWritePaths") == {str(SITE.state), str(SITE.socket.parent)}
    assert words(daemon, "ReadOnlyPaths") == {SHARD}
    assert daemon["MemorySwapMax"] == ["0"]


def test_the_relay_sees_its_folder_and_the_socket() -> None:
    relay = unit("relay")
    assert relay["ExecStart"] == [f"{PROGRAM} site join {SITE.relay.root}"]
    hidden = {word.removesuffix(":ro") for word in words(relay, "TemporaryFileSystem")}
    for place in (SITE.state, SITE.policy_file, Path(SHARD)):
        assert any(place.is_relative_to(folder) for folder in hidden), f"{place} is seen"
    assert words(relay, "BindPaths") == words(relay, "ReadWritePaths") == {str(SITE.relay.root)}
    assert words(relay, "BindReadOnlyPaths") == {str(SITE.socket.parent)}


def test_the_relay_never_gives_up() -> None:
    relay = unit("relay")
    assert relay["Restart"] == ["always"]
    assert relay["RestartSec"] == ["15"]
    assert relay["StartLimitIntervalSec"] == ["0"]


def test_the_coordinator_sees_its_folder() -> None:
    coordinator = unit("coordinator")
    assert words(coordinator, "BindPaths") == {str(COORDINATOR.root)}
    assert words(coordinator, "ReadWritePaths") == {str(COORDINATOR.root)}


def test_the_users_are_made_and_none_is_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for program, option, folder in (
        ("systemd-sysusers", [], "sysusers.d"),
        ("systemd-tmpfiles", ["--create"], "tmpfiles.d"),
    ):
        files = sorted((FILES / folder).glob("*.conf"))
        command = [needs(program), f"--root={tmp_path}", *option, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    numbers = {
        line.split(":")[0]: int(line.split(":")[2])
        for line in (tmp_path / "etc/passwd").read_text().splitlines()
    }
    groups = {
        line.split(":")[0]: set(line.split(":")[3].split(","))
        for line in (tmp_path / "etc/group").read_text().splitlines()
    }
    users = {path.stem: unit(path.stem.removeprefix("fedward-")) for path in UNITS}
    assert {user for found in users.values() for user in found["User"]} == set(numbers)
    assert all(numbers.values())
    assert {group for found in users.values() for group in found["Group"]} <= set(groups)
    assert groups["fedward"] == {"fedward-site", "fedward-relay"}
    made = tmp_path / COORDINATOR.root.relative_to("/")
    assert made.stat().st_uid == numbers["fedward-coordinator"]
    assert made.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / SITE.root.parent.relative_to("/")).stat().st_uid == 0


def test_a_daemon_without_network_answers(ward_module: ModuleType, tmp_path: Path) -> None:
    """What PrivateNetwork and `network_mode: none` leave: the socket is reached from outside."""
    alone = [needs("unshare"), "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a network namespace")
    world = ward_module.Ward(tmp_path)
    world.daemon._lock.release()
    (tmp_path / "site.toml").write_text(world.config.to_toml())
    fedward = Path(sys.executable).with_name("fedward")
    inside = 'test "$(ls /sys/class/net)" = lo -o -z "$(cat /proc/net/route | tail -n +2)" && exec '
    daemon = subprocess.Popen(
        [*alone, "sh", "-c", f'{inside} "$@"', "sh", fedward, "site", "serve", "site.toml"],
        cwd=tmp_path,
    )
    try:
        ready = tmp_path / "d.sock.ready"
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert daemon.poll() is None, "the daemon ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        request = world.coordinator.seal(world.request("prepare", ward_module.make_study()), None)
        with grpc.insecure_channel(f"unix:{tmp_path / 'd.sock'}") as channel:
            packed = channel.unary_unary("/fedward.Site/Call")(request.pack(), timeout=120)
        keys = [hospital.identity.public for hospital in world.hospitals.values()]
        answer = open_envelope(Envelope.unpack(packed), Answer, keys)
        assert answer.refusal is None
    finally:
        daemon.terminate()
        daemon.wait(timeout=60)


_CONNECT = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 9443))
os.setuid(int(sys.argv[1]))
sys.exit(socket.socket().connect_ex(("127.0.0.1", 9443)) != 0)
"""


@pytest.mark.parametrize(("user", "admitted"), [(65534, True), (1234, False), (0, False)])
def test_only_the_coordinators_user_reaches_the_superlink(
    tmp_path: Path, user: int, admitted: bool
) -> None:
    needs("nft")
    rules = (FILES / "nftables" / "fedward-coordinator.nft").read_text()
    port = Config.model_fields["superlink_port"].default
    assert f"tcp dport {port} " in rules
    if os.geteuid() or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("only root may set a firewall, in a network namespace of its own")
    (tmp_path / "rules").write_text(rules.replace('"fedward-coordinator"', "65534"))
    script = f'ip link set lo up && nft -f {tmp_path}/rules && exec "$@"'
    python = Path(sys.executable).resolve()
    command = ["unshare", "--net", "sh", "-c", script, "sh", python, "-c", _CONNECT, str(user)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if admitted else 1), done.stderr


# -- containers -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_is_pinned_and_not_root(path: Path) -> None:
    text = path.read_text()
    stages = {"python", "build"}
    for source in re.findall(r"^FROM (\S+)|--from=(\S+)", text, flags=re.M):
        (image,) = filter(None, source)
        assert image in stages or re.search(r":\d+\.\d+\.\d+", image), f"{image} is not pinned"
    last = text.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\d+:\d+)$", last, flags=re.M)
    assert not user.startswith("0:")
    number, group = user.split(":")
    assert f"--uid {number} --gid {group}" in last
    assert "uv sync --frozen" in text


def test_only_the_site_has_torch() -> None:
    coordinator, site = (path.read_text() for path in DOCKERFILES)
    assert "--extra" not in coordinator
    assert site.count("--extra site") == site.count("uv sync")


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([needs("hadolint"), path], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_the_build_context_holds_what_the_wheel_is_made_of() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    admitted = {line.removeprefix("!") for line in lines if line.startswith("!")}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert admitted == {*packages, "pyproject.toml", "uv.lock", PROJECT["project"]["readme"]}
    assert all((REPOSITORY / name).exists() for name in admitted)


@pytest.mark.parametrize("service", ALL_SERVICES)
def test_a_container_is_hardened(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["ulimits"] == {"core": 0}
    assert not {"privileged", "cap_add", "pid", "ipc"} & set(service)
    assert int(service["user"].partition(":")[0]) > 0
    assert service["image"].endswith(f":{PROJECT['project']['version']}")


@pytest.mark.parametrize("path", COMPOSES, ids=name_of)
def test_a_container_is_built_of_its_image(path: Path) -> None:
    builds = [s["build"] for s in services(path.name.split(".")[1]).values() if "build" in s]
    assert len(builds) == 1
    context = (path.parent / builds[0]["context"]).resolve()
    assert context == REPOSITORY
    assert context / builds[0]["dockerfile"] in DOCKERFILES


def test_the_daemons_container_has_no_network_and_reads_the_shard_only() -> None:
    daemon = services("site")["daemon"]
    assert daemon["network_mode"] == "none"
    assert "ports" not in daemon
    found = mounts(daemon)
    assert found.pop(SHARD) == "ro"
    assert {place for place, mode in found.items() if mode == "rw"} == {
        str(SITE.state),
        str(SITE.socket.parent),
    }


def test_the_relays_container_sees_neither_shard_nor_state() -> None:
    relay = services("site")["relay"]
    assert mounts(relay) == {str(SITE.relay.root): "rw", str(SITE.socket.parent): "ro"}
    assert "ports" not in relay
    assert relay["restart"] == "always"
    assert relay["user"] != services("site")["daemon"]["user"]


def test_the_coordinators_container_opens_one_port() -> None:
    coordinator = services("coordinator")["coordinator"]
    assert coordinator["ports"] == ["8443:8443"]
    assert mounts(coordinator) == {str(COORDINATOR.root): "rw"}


# -- exit codes -------------------------------------------------------------------------------


def test_flowers_exit_codes_are_as_documented() -> None:
    page = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    shown = re.findall(r"^### (\d{3}): `([A-Z_]+)`$", page, flags=re.M)
    assert len(shown) >= 10
    for number, name in shown:
        assert getattr(ExitCode, name) == int(number)


def test_the_words_of_a_deployments_errors_are_documented() -> None:
    page = (REPOSITORY / "docs" / "exit-codes.md").read_text().partition("\n## Units")[0]
    sources = [*(REPOSITORY / "deploy").rglob("*.py"), REPOSITORY / "common" / "roster.py"]
    found = {
        code
        for path in sources
        for code in re.findall(r'^    code = "([a-z-]+)"$', path.read_text(), flags=re.M)
    }
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.M)) == found
