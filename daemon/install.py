"""``fastsd service install | uninstall``: a systemd unit with the real paths of this installation.

``render_unit`` is pure; ``install_unit`` and ``uninstall_unit`` write the file and run systemctl through what they
are given.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sessions import files
from sessions.refusal import Refusal

Scope = Literal["user", "system"]
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]

NAME = "fastsd.service"
SYSTEM_FOLDER = Path("/etc/systemd/system")
SYSTEM_STATE = Path("/var/lib/fastsd")
SYSTEM_SECRETS = Path("/etc/fastsd/environment")

_COMMON = """\
[Unit]
Description=fastsd: pictures in, models out ({root_plain})
After=network-online.target
Wants=network-online.target
RequiresMountsFor={root}
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=notify
ExecStart={command} up {argument}
{identity}{state}Environment=PYTHONUNBUFFERED=1
# The WebUI's password, a token for the hub: NAME=value lines in a file that only you can read.
EnvironmentFile=-{secrets}

# Exit code 78 is a mistake in fastsd.yaml: starting again would not mend it.
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=78
WatchdogSec=60
# SIGTERM goes to the daemon alone: it saves a running training, and then ends what it started.
KillMode=mixed
TimeoutStartSec=300
TimeoutStopSec=300
# A training that needs too much memory must not take the daemon along.
OOMPolicy=continue
NoNewPrivileges=yes
UMask=0077
"""

# Of the sandbox, what a user's own manager can give without privileges is little: the rest would keep it from starting.
_USER = """\
LockPersonality=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""

_SYSTEM = """\
StateDirectory=fastsd
StateDirectoryMode=0700
ProtectSystem=strict
ProtectHome={protect_home}
ReadWritePaths={writable}
PrivateTmp=yes
# The GPU: its device files, and nothing else.
PrivateDevices=no
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-drm rw
DeviceAllow=char-kfd rw
# torch compiles code while it runs (bfloat16 on a CPU fails without).
MemoryDenyWriteExecute=no
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
SystemCallArchitectures=native
ProcSubset=all
ProtectProc=invisible
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
CapabilityBoundingSet=
AmbientCapabilities=

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Unit:
    """What a unit says.

    Attributes:
        scope: ``user``: started by the user's own manager; ``system``: at boot, as ``user``.
        command: the absolute path of ``fastsd``.
        root: the tree.
        state: the folder of all states; None: the user's own.
        secrets: a file with environment variables; it need not be there.
        user: whom a system unit runs as.
        writable: folders outside the tree that it writes to (the WebUI's).
        read: what else it needs to see (its interpreter).
    """

    scope: Scope
    command: Path
    root: Path
    state: Path | None
    secrets: Path
    user: str | None = None
    writable: tuple[Path, ...] = ()
    read: tuple[Path, ...] = ()


def render_unit(unit: Unit) -> str:
    """The text of a systemd unit.

    Raises:
        ValueError: a path is relative or holds a line break, or a system unit has no user.
    """
    states = (unit.state,) if unit.state else ()
    named = (unit.command, unit.root, *states, unit.secrets, *unit.writable, *unit.read)
    for path in named:
        if not path.is_absolute() or re.search(r"[\x00-\x1f\x7f]", str(path)):
            message = f"a unit needs absolute paths without control characters, not {str(path)!r}"
            raise ValueError(message)
    if unit.scope == "system" and not unit.user:
        message = "a system unit needs a user to run as"
        raise ValueError(message)
    text = _COMMON + (_SYSTEM if unit.scope == "system" else _USER)
    in_home = any(path.is_relative_to(home) for path in named for home in _HOMES)
    return text.format(
        root_plain=str(unit.root).replace("%", "%%"),
        root=_quoted(unit.root),
        command=_quoted(unit.command).replace("$", "$$"),
        argument=_quoted(unit.root).replace("$", "$$"),
        identity=f"User={unit.user}\n" if unit.scope == "system" else "",
        state="".join(f"Environment={_quoted(Path(f'FASTSD_STATE={path}'))}\n" for path in states),
        secrets=str(unit.secrets).replace("%", "%%"),
        # Hidden homes hide an environment or a tree that lies there as well; read-only they can be used.
        protect_home="read-only" if in_home else "yes",
        # "-": a folder of the WebUI that is not there must not keep the daemon from starting.
        writable=" ".join([*map(_quoted, (unit.root, *states)), *(_quoted(path, "-") for path in unit.writable)]),
    )


_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))


def _quoted(path: Path, prefix: str = "") -> str:
    """A path as one word of a unit, where % begins a specifier."""
    text = (prefix + str(path)).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if re.search(r"[\s\\\"';#]", text) else text


@dataclass(frozen=True)
class Outcome:
    """What an installation did.

    Attributes:
        path: the unit file.
        said: what was done and what comes next, a sentence a line, for people.
        done: whether all of it worked.
    """

    path: Path
    said: tuple[str, ...]
    done: bool = True


def unit_folder(scope: Scope, home: Path) -> Path:
    """Where units of a scope lie."""
    return SYSTEM_FOLDER if scope == "system" else home / ".config/systemd/user"


def install_unit(unit: Unit, folder: Path, run: Run, *, has_systemd: bool) -> Outcome:
    """Write a unit, have systemd read it, and have it start at boot or log-in.

    Args:
        unit: what it says.
        folder: where to write it (``unit_folder``).
        run: runs a command and gives what became of it.
        has_systemd: whether a systemd runs here.

    Raises:
        Refusal: the folder cannot be written.
    """
    path = folder / NAME
    try:
        files.write_text(path, render_unit(unit))
        path.chmod(0o644)
    except PermissionError as error:
        raise Refusal(
            "no-right", f"{path} cannot be written.", "Run it with sudo, or install for your user."
        ) from error
    said = [f"wrote {path}"]
    control = ["systemctl", *(["--user"] if unit.scope == "user" else [])]
    typed = " ".join(control)
    if not has_systemd:
        said.append(f"no systemd runs here; where one does: {typed} daemon-reload && {typed} enable --now {NAME}")
        return Outcome(path, tuple(said))
    # The restart is not waited for: the daemon is ready when it has seen the tree.
    steps = (["daemon-reload"], ["enable", NAME], ["restart", "--no-block", NAME])
    told = [_told([*control, *words], run) for words in steps]
    said += [line for line, _ in told]
    said.append(f"look at it:        {typed} status {NAME}    or    fastsd status")
    if unit.scope == "user":
        said.append("to have it run while you are not logged in:      loginctl enable-linger")
    return Outcome(path, tuple(said), all(worked for _, worked in told))


def uninstall_unit(scope: Scope, folder: Path, run: Run, *, has_systemd: bool) -> Outcome:
    """Stop the service and remove its unit; the tree and the state stay.

    Raises:
        Refusal: the unit cannot be removed.
    """
    path = folder / NAME
    if not path.exists():
        return Outcome(path, (f"there is no {path}",))
    control = ["systemctl", *(["--user"] if scope == "user" else [])]
    told = [_told([*control, "disable", "--now", NAME], run)] if has_systemd else []
    try:
        path.unlink()
    except PermissionError as error:
        raise Refusal("no-right", f"{path} cannot be removed.", "Run it with sudo.") from error
    if has_systemd:
        told.append(_told([*control, "daemon-reload"], run))
    said = [*(line for line, _ in told), f"removed {path}; your tree and fastsd's state are as they were"]
    return Outcome(path, tuple(said), all(worked for _, worked in told))


def _told(command: Sequence[str], run: Run) -> tuple[str, bool]:
    """Run a command. Returns the line that says how it went, and whether it worked: the rest goes on either way."""
    typed = " ".join(command)
    try:
        done = run(command)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not run {typed}: {error}", False
    if done.returncode == 0:
        return f"ran {typed}", True
    words = (done.stderr or done.stdout or "").strip().splitlines()
    return f"{typed} failed with {done.returncode}: {words[-1] if words else 'it said nothing'}", False


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured, for as long as a daemon may take to save and stop."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=330)


def systemd_runs() -> bool:
    """Whether this machine was started by systemd, as sd_booted(3) tells."""
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None
