"""The doctor between nodes: do the ranks meet, how fast is each pair, do versions and the folder agree, does all-reduce work.

Ranks meet at a store, like those of a run. One rank per node (all ranks, if there is one node) then measures its peers by
TCP, at the address by which it reaches rank 0's node: all pairs of up to 8 nodes, a ring of more. Every wait has a limit.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from himix_megatron.distributed.launch import Launch, address_of
from himix_megatron.runtime.background_thread import BackgroundThread
from himix_megatron.runtime.errors import RankError
from tools.doctor.finding import Finding

ALL_PAIRS = 8
"""Most members of which every pair is measured."""
PINGS = 50
STREAM = bytes(32 << 20)
"""What a pair sends each way to measure its rate."""
SLOW = 0.5
"""A pair below this share of the median rate is reported."""
LEAST_GBIT = 1.0


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """What this rank reports."""

    findings: list[Finding]
    code: int
    alone: bool = False
    """It met no other rank, so it prints for itself."""


@dataclass(frozen=True, slots=True)
class Member:
    """A rank that measures."""

    rank: int
    node: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.node} (rank {self.rank})"


class StoreBoard:
    """The store as a bulletin board: JSON under keys, and waits with a limit."""

    def __init__(self, store: Any, seconds: float):
        self.store, self.seconds = store, seconds

    def put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float | None = None) -> Any:
        """The value; None if nobody puts it in time."""
        try:
            self.store.wait([key], timedelta(seconds=max(0.01, self.seconds if seconds is None else seconds)))
        except (dist.DistStoreError, dist.DistNetworkError):
            return None
        return json.loads(self.store.get(key))

    def gather(self, key: str, numbers: Sequence[int]) -> dict[int, Any]:
        """`key/NUMBER` of each number that is put in time."""
        deadline = time.monotonic() + self.seconds
        found = {number: self.get(f"{key}/{number}", deadline - time.monotonic()) for number in numbers}
        return {number: value for number, value in found.items() if value is not None}


def meet(launch: Launch, own: list[Finding], folder: Path, seconds: float) -> NetworkReport:
    """Meet the other ranks and measure. `own`: what this rank found on its machine."""
    try:
        address = address_of(launch.host)
        board = StoreBoard(in_time(lambda: join(launch, address, seconds), seconds), seconds)
    except (RankError, TimeoutError, dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        detail = f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.host}:{launch.port}: {reason}"
        remedy = "does rank 0 run there, is the port free, and no firewall between? MASTER_ADDR and MASTER_PORT choose"
        return NetworkReport([*own, Finding("network", "broken", detail, remedy, needed=True)], 1, alone=True)
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server(("::" if ":" in address else "", 0), family=family, backlog=16) as listener:
        mine = address  # rank 0 is known by it, though on its own node that may be a loopback address
        if launch.rank:
            with socket.socket(family, socket.SOCK_DGRAM) as route:
                route.connect((address, launch.port))  # a datagram socket only looks up the route
                mine = str(route.getsockname()[0])
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        here = Member(launch.rank, node, mine, listener.getsockname()[1])
        versions = {"python": platform.python_version()}
        versions |= {name: metadata.version(name) for name in ("torch", "megatron-core", "himix-megatron")}
        facts = {"member": asdict(here), "versions": versions, "findings": [asdict(finding) for finding in own]}
        board.put(f"here/{here.rank}", facts)
        return (lead if launch.rank == 0 else follow)(board, launch, here, listener, folder)


def join(launch: Launch, address: str, seconds: float) -> dist.Store:
    """The store at which a run's ranks would meet: torchrun's, or one that rank 0 opens."""
    is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        address, launch.port, launch.world_size, is_master, timedelta(seconds=seconds),
        wait_for_workers=False,  # missing ranks are to be named
    )  # fmt: skip
    return dist.PrefixStore("doctor", store)


def in_time(make: Callable[[], dist.Store], seconds: float) -> dist.Store:
    """What a function returns. Raises: what it raises; TimeoutError if it exceeds its own timeout by far.

    torch's store waits forever for a server that accepts its connection and says nothing, whatever its timeout.
    """
    made = BackgroundThread("meet").start(make)  # a stuck one does not keep this process
    if not wait([made], 1.5 * seconds + 2).done:
        raise TimeoutError("somebody listens there, but does not answer as a run's rank 0 would")
    return made.result()


# ---- who does what -----------------------------------------------------------------------------------------------------


def lead(board: StoreBoard, launch: Launch, here: Member, listener: socket.socket, folder: Path) -> NetworkReport:
    """Rank 0: plan, take part, judge."""
    came = board.gather("here", range(launch.world_size))
    findings = absent(launch.world_size, came)
    members = leaders([Member(**facts["member"]) for facts in came.values()])
    probe = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        probe.write_text(probe.name)
    except OSError:
        probe = Path()  # the finding about the folder reports it
    rounds = rounds_of(len(members))
    board.put("plan", {"members": [asdict(member) for member in members], "rounds": rounds, "probe": probe.name})
    try:
        measure_rounds(board, members, rounds, here, listener)
        results = board.gather("pair", range(sum(map(len, rounds))))
        saw = board.gather("probe", [member.rank for member in members[1:]]) if probe.name else {}
    finally:
        if probe.name:
            probe.unlink(missing_ok=True)
    findings += judge_pairs(members, [pair for one in rounds for pair in one], results)
    findings += judge_versions({facts["member"]["node"]: facts["versions"] for facts in came.values()})
    if probe.name and members[1:]:
        blind = [member.node for member in members[1:] if not saw.get(member.rank)]
        findings.append(
            Finding("shared folder", "broken", f"{folder.absolute()} is not the same on {_some(blind)}",
                    "runs need a folder that all nodes see: --folder", needed=True)
            if blind
            else Finding("shared folder", "ok", f"{folder.absolute()}: the other nodes see what rank 0 writes")
        )  # fmt: skip
    works = not Finding.code(findings)
    board.put("go", works)
    if works:
        findings.append(collective(board, launch))
    own, *theirs = ([Finding(**one) for one in came[member.rank]["findings"]] for member in members)
    same = {(finding.what, finding.state) for finding in own}
    for member, found in zip(members[1:], theirs, strict=True):
        own += [replace(one, what=f"{one.what} on {member.node}") for one in found if (one.what, one.state) not in same]
    code = Finding.code([*own, *findings])
    board.put("code", code)
    board.gather("left", [rank for rank in came if rank])  # the store ends with this process
    return NetworkReport([*own, *findings], code)


def follow(board: StoreBoard, launch: Launch, here: Member, listener: socket.socket, folder: Path) -> NetworkReport:
    """Any other rank."""
    plan = board.get("plan", 2 * board.seconds)
    if plan is None:
        detail = f"{here} met the others' store, but rank 0 did not go on"
        return NetworkReport([Finding("network", "broken", detail, "its own output says why", needed=True)], 1, alone=True)
    members = [Member(**member) for member in plan["members"]]
    if here in members:
        if plan["probe"]:
            board.put(f"probe/{here.rank}", appears(folder / plan["probe"], min(10.0, board.seconds / 2)))
        measure_rounds(board, members, plan["rounds"], here, listener)
    patience = (len(plan["rounds"]) + 3) * board.seconds
    if board.get("go", patience):
        collective(board, launch)
    code = board.get("code", patience)
    board.put(f"left/{here.rank}", True)
    return NetworkReport([], 1 if code is None else code)


def leaders(ranks: Sequence[Member]) -> list[Member]:
    """The first rank of each node; of a single node all ranks, but no more than are measured in pairs."""
    first: dict[str, Member] = {}
    for rank in ranks:
        first.setdefault(rank.node, rank)
    return list(first.values()) if len(first) > 1 else list(ranks)[:ALL_PAIRS]


def rounds_of(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of members in rounds, nobody twice in one: all pairs of a few, neighbours in a ring of many."""
    if count < 2:
        return []
    if count > ALL_PAIRS:
        ring = [(i, (i + 1) % count) for i in range(count)]
        even, odd = ring[: count - count % 2 : 2], ring[1 : count - count % 2 : 2]
        return [even, odd, *([[ring[-1]]] if count % 2 else [])]
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):  # a tournament: the first stays, the others move on by one seat
        facing = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


# ---- measuring ---------------------------------------------------------------------------------------------------------


def measure_rounds(
    board: StoreBoard,
    members: Sequence[Member],
    rounds: Sequence[Sequence[Sequence[int]]],
    here: Member,
    listener: socket.socket,
) -> None:
    """Take part in the rounds; the first of each pair writes `pair/NUMBER`."""
    me, number, together = members.index(here), 0, True
    for turn, pairs in enumerate(rounds):
        for a, b in pairs:
            try:
                if a == me:
                    board.put(f"pair/{number}", {"error": None, **ask(members[b], board.seconds / 3)})
                elif b == me:
                    answer(listener, board.seconds / 2)
            except OSError as error:
                if a == me:
                    board.put(f"pair/{number}", {"error": error.strerror or str(error) or type(error).__name__})
            number += 1
        # Pairs of the next round would disturb those of this one; once a member is lost, waiting for it is no use.
        if together:
            if board.store.add(f"round/{turn}", 1) == len(members):
                board.put(f"round/{turn}/over", True)
            together = board.get(f"round/{turn}/over") is not None


def ask(peer: Member, seconds: float) -> dict[str, float]:
    """Latency to a member, and the slower direction's rate. Raises: OSError."""
    with socket.create_connection((peer.address, peer.port), timeout=seconds) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def trip(sent: bytes, size: int) -> float:
            begun = time.perf_counter()
            link.sendall(sent)
            receive(link, size)
            return time.perf_counter() - begun

        latency = statistics.median(trip(b"?", 1) for _ in range(PINGS)) / 2
        return {"latency_seconds": latency, "bytes_per_second": len(STREAM) / max(trip(STREAM, 1), trip(b"?", len(STREAM)))}


def answer(listener: socket.socket, seconds: float) -> None:
    """The other end of `ask`. Raises: OSError."""
    listener.settimeout(seconds)
    link, _ = listener.accept()
    with link:
        link.settimeout(seconds)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size, reply in [*[(1, b".")] * PINGS, (len(STREAM), b"."), (1, STREAM)]:
            receive(link, size)
            link.sendall(reply)


def receive(link: socket.socket, size: int) -> None:
    """Read this number of bytes. Raises: OSError, also if the other side has gone."""
    while size:
        got = len(link.recv(min(size, 1 << 20)))
        if not got:
            raise ConnectionResetError("the other side has gone")
        size -= got


def collective(board: StoreBoard, launch: Launch) -> Finding:
    """An all-reduce over all ranks with the backend that training uses."""
    size, device = 1 << 22, torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an error instead of an aborted process
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore("collective", board.store), rank=launch.rank, world_size=launch.world_size,
            timeout=timedelta(seconds=board.seconds),
        )  # fmt: skip
        numbers = torch.ones(size, device=device)
        dist.all_reduce(numbers)  # connects
        begun = time.perf_counter()
        dist.all_reduce(numbers)
        right = bool((numbers == launch.world_size**2).all())
        seconds = time.perf_counter() - begun
    except RuntimeError as error:
        detail = f"{backend}: {' '.join(str(error).splitlines()[0].split())[:160]}"
        remedy = f"name the interface between nodes: {'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME"
        return Finding("all-reduce", "broken", detail, remedy, needed=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    # The bytes that each rank sends in a ring, by which links are compared.
    rate = 2 * (launch.world_size - 1) / launch.world_size * size * 4 / seconds
    text = f"{backend}, {launch.world_size} ranks: {size * 4 >> 20} MiB in {seconds * 1000:.0f} ms ({gbit(rate)} a rank)"
    if not right:
        return Finding("all-reduce", "broken", f"{text}, but the sum is wrong", "do not train here", needed=True)
    return Finding("all-reduce", "ok", text)


def appears(file: Path, seconds: float) -> bool:
    """Whether a file is seen within a time; network file systems cache for some seconds that it was not there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if file.parent.is_dir() and file.name in os.listdir(file.parent):
            return True
        time.sleep(0.5)
    return False


# ---- judging -----------------------------------------------------------------------------------------------------------


def absent(world_size: int, came: dict[int, Any]) -> list[Finding]:
    """Ranks that did not come."""
    missing = [str(rank) for rank in range(world_size) if rank not in came]
    detail = f"{len(missing)} of {world_size} ranks did not come: {_some(missing)}"
    return [Finding("network", "broken", detail, "look at their own output", needed=True)] if missing else []


def judge_pairs(members: Sequence[Member], pairs: Sequence[tuple[int, int]], results: dict[int, Any]) -> list[Finding]:
    """Unreachable pairs, one line that sums up, slow pairs."""
    findings, named = [], [f"{members[a]} and {members[b]}" for a, b in pairs]
    for number, (_, b) in enumerate(pairs):
        if error := results.get(number, {"error": "no result came"})["error"]:
            detail = f"{named[number]} do not reach each other: {error} ({members[b].address}:{members[b].port})"
            remedy = "firewall, wrong interface, or a node that hangs: try ping and ip route between them"
            findings.append(Finding("network", "broken", detail, remedy, needed=True))
    rates = {number: result["bytes_per_second"] for number, result in results.items() if not result["error"]}
    if not rates:
        return findings
    middle, slowest, nodes = (
        statistics.median(rates.values()),
        min(rates, key=lambda n: rates[n]),
        len({m.node for m in members}),
    )
    latencies = [results[number]["latency_seconds"] * 1e6 for number in rates]
    text = f"{len(rates)} pairs of {nodes} node{'s' if nodes > 1 else ''} by TCP: {gbit(rates[slowest])} to "
    text += f"{gbit(max(rates.values()))}, latency {min(latencies):.0f} to {max(latencies):.0f} us"
    findings.append(Finding("network", "ok", f"{text}, slowest between {named[slowest]}"))
    for number, rate in rates.items():
        if rate < SLOW * middle or rate * 8e-9 < LEAST_GBIT:
            detail = f"{named[number]}: {gbit(rate)}, the median is {gbit(middle)}"
            findings.append(Finding("slow pair", "warning", detail, "cable, switch port, or other traffic"))
    return findings


def judge_versions(found: dict[str, dict[str, str]]) -> list[Finding]:
    """By node. Ranks of different versions may train different things."""
    findings, names = [], list(next(iter(found.values()), {}))
    for name in names:
        nodes: dict[str, list[str]] = {}
        for node, known in found.items():
            nodes.setdefault(known.get(name, "none"), []).append(node)
        if len(nodes) > 1:
            detail = "; ".join(f"{version} on {_some(on)}" for version, on in nodes.items())
            findings.append(Finding("versions", "broken", f"{name}: {detail}", "install the same on all nodes", needed=True))
    return findings or [Finding("versions", "ok", f"{', '.join(names)}: the same on all nodes")]


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if names[8:] else ''}"


def gbit(bytes_per_second: float) -> str:
    """Gbit/s."""
    return f"{bytes_per_second * 8e-9:.3g} Gbit/s"
