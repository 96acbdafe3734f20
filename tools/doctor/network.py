"""The doctor between nodes: do the ranks meet, is every pair reachable and as fast as the others, do clocks and versions agree,
is the folder the same everywhere, does a collective go through.

Ranks meet at a store where a run would. One rank a node (all ranks, where there is one node) then measures its peers by plain
TCP, at the address by which rank 0's node is reached: all pairs up to 8 nodes, a ring beyond. No wait is without an end.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from himix_megatron.distributed.launch import Launch, address_of
from himix_megatron.runtime.errors import RankError
from tools.doctor.finding import Finding

ALL_PAIRS = 8
"""Most members of which every pair is measured."""
PINGS = 50
STREAM_SECONDS = 0.5
CHUNK = bytes(1 << 20)
CLOCK_SECONDS = 1.0
"""By which clocks may differ."""
SLOW = 0.5
"""A pair below this part of the median rate is named."""
LEAST_GBIT = 1.0
REACH = "firewall, wrong interface, or a node that hangs: try ping and ip route between them"


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """What this rank has to say."""

    findings: list[Finding]
    code: int
    alone: bool = False
    """It met nobody, so it has to speak for itself."""


@dataclass(frozen=True, slots=True)
class Member:
    """A rank that measures."""

    rank: int
    node: str
    address: str
    port: int


class StoreBoard:
    """The store as a notice board: JSON under keys, each wait with an end."""

    def __init__(self, store: Any, seconds: float):
        self.store, self.seconds = store, seconds

    def put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float | None = None) -> Any:
        """The value; None if nobody has put it in time."""
        try:
            self.store.wait([key], timedelta(seconds=max(0.01, self.seconds if seconds is None else seconds)))
        except (dist.DistStoreError, dist.DistNetworkError):
            return None
        return json.loads(self.store.get(key))

    def gather(self, key: str, numbers: Sequence[int]) -> dict[int, Any]:
        """`key/NUMBER` of each number, as far as they come in time."""
        deadline = time.monotonic() + self.seconds
        found = {number: self.get(f"{key}/{number}", deadline - time.monotonic()) for number in numbers}
        return {number: value for number, value in found.items() if value is not None}


def meet(launch: Launch, own: list[Finding], folder: Path, seconds: float) -> NetworkReport:
    """Meet the other ranks and measure. `own`: what this rank found on its machine."""
    try:
        address = address_of(launch.host)
        store = in_time(lambda: join(launch, address, seconds), seconds)
    except (RankError, TimeoutError, dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        detail = f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.host}:{launch.port}: {reason}"
        remedy = "does rank 0 run there, is the port free, and no firewall between? MASTER_ADDR and MASTER_PORT choose"
        return NetworkReport([*own, Finding("network", "broken", detail, remedy, needed=True)], 1, alone=True)
    board = StoreBoard(store, seconds)
    with socket.create_server(("::" if ":" in address else "", 0), family=_family(address), backlog=16) as listener:
        # Rank 0 goes by the name that the others know it by: on its own node that may be a loopback address.
        mine = local_address(address, launch.port) if launch.rank else address
        here = Member(launch.rank, node_name(), mine, listener.getsockname()[1])
        board.put(f"here/{launch.rank}", {"member": asdict(here), "versions": versions()})
        board.put(f"own/{launch.rank}", [asdict(finding) for finding in own])
        if launch.rank == 0:
            return lead(board, launch, here, listener, own, folder)
        return follow(board, launch, here, listener, folder)


def join(launch: Launch, address: str, seconds: float) -> dist.Store:
    """The store that a run's ranks would meet at: torchrun's, or one that rank 0 opens."""
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        address,
        launch.port,
        launch.world_size,
        is_master=launch.rank == 0 and not torchruns,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,  # who is missing is to be named
    )
    return dist.PrefixStore("doctor", store)


def in_time(make: Callable[[], Any], seconds: float) -> Any:
    """What a function returns. Raises: what it raises; TimeoutError when it is stuck well beyond its own timeout.

    torch's store waits without an end for somebody who takes its connection and says nothing, whatever timeout it is given.
    """
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((make(), None))
        except (ValueError, RuntimeError) as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()  # one that stays stuck does not keep this process
    try:
        made, error = results.get(timeout=1.5 * seconds + 2)
    except queue.Empty:
        raise TimeoutError("somebody listens there, but does not answer as a run's rank 0 would") from None
    if error is not None:
        raise error
    return made


# ---- who does what -----------------------------------------------------------------------------------------------------


def lead(
    board: StoreBoard, launch: Launch, here: Member, listener: socket.socket, own: list[Finding], folder: Path
) -> NetworkReport:
    """Rank 0: plan, measure along, judge."""
    came = board.gather("here", range(launch.world_size))
    findings = absent(launch.world_size, came)
    members = leaders([Member(**facts["member"]) for facts in came.values()])
    probe = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        probe.write_text(probe.name)
    except OSError:
        probe = Path()  # the line on the folder says so already
    rounds = rounds_of(len(members))
    board.put("plan", {"members": [asdict(member) for member in members], "rounds": rounds, "probe": probe.name})
    try:
        measure_rounds(board, members, rounds, here, listener)
        results = board.gather("pair", range(sum(map(len, rounds))))
        seen = board.gather("probe", [member.rank for member in members if member.rank]) if probe.name else {}
    finally:
        if probe.name:
            probe.unlink(missing_ok=True)
    pairs = [pair for one in rounds for pair in one]
    findings += judge_pairs(members, pairs, results)
    findings += judge_versions({facts["member"]["node"]: facts["versions"] for facts in came.values()})
    if probe.name:
        findings += judge_probe([member for member in members if member.rank], seen, folder)
    whole = not Finding.code(findings)
    board.put("go", whole)
    if whole:
        findings.append(collective(board, launch))
    findings = [*own, *others(board, own, members), *findings]
    code = Finding.code(findings)
    board.put("code", code)
    board.gather("left", [rank for rank in came if rank])  # the store ends with this process
    return NetworkReport(findings, code)


def follow(board: StoreBoard, launch: Launch, here: Member, listener: socket.socket, folder: Path) -> NetworkReport:
    """Any other rank."""
    plan = board.get("plan", 2 * board.seconds)
    if plan is None:
        detail = f"rank {launch.rank} ({here.node}) met the others' store, but rank 0 did not go on"
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
    """The first rank of each node; of one node alone all ranks, but no more than are measured in pairs."""
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
        # Pairs of the next round would disturb those of this one; after a member is lost, waiting for it again is no use.
        if together:
            if board.store.add(f"round/{turn}", 1) == len(members):
                board.put(f"round/{turn}/over", True)
            together = board.get(f"round/{turn}/over") is not None


def ask(peer: Member, seconds: float) -> dict[str, float]:
    """Latency, clock and rates to a member. Raises: OSError."""
    with socket.create_connection((peer.address, peer.port), timeout=seconds) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(PINGS):
            sent = time.time()
            begun = time.perf_counter()
            link.sendall(b"?")
            theirs: float = struct.unpack("!d", receive(link, 8))[0]
            took = time.perf_counter() - begun
            trips.append((took, theirs - sent - took / 2))
        there = stream(link)
        back = drain(link)
        quickest, clock = min(trips)
        return {"latency_seconds": statistics.median(took for took, _ in trips) / 2, "quickest": quickest / 2, "clock": clock,
                "there": there, "back": back}  # fmt: skip


def answer(listener: socket.socket, seconds: float) -> None:
    """The other end of `ask`. Raises: OSError."""
    listener.settimeout(seconds)
    link, _ = listener.accept()
    with link:
        link.settimeout(seconds)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            receive(link, 1)
            link.sendall(struct.pack("!d", time.time()))
        drain(link)
        stream(link)


def stream(link: socket.socket) -> float:
    """Send for a while. Returns: bytes a second, until the other side has all of it."""
    begun, chunks = time.perf_counter(), 0
    while chunks == 0 or time.perf_counter() - begun < STREAM_SECONDS:
        link.sendall(b"+" + CHUNK)
        chunks += 1
    link.sendall(b".")
    receive(link, 1)
    return chunks * len(CHUNK) / (time.perf_counter() - begun)


def drain(link: socket.socket) -> float:
    """The other end of `stream`. Returns: bytes a second."""
    begun, chunks = time.perf_counter(), 0
    while receive(link, 1) == b"+":
        receive(link, len(CHUNK))
        chunks += 1
    seconds = time.perf_counter() - begun
    link.sendall(b".")
    return chunks * len(CHUNK) / seconds


def receive(link: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises: OSError, also when the other side has gone."""
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = link.recv_into(view[got:])
        if count == 0:
            raise ConnectionResetError("the other side has gone")
        got += count
    return bytes(data)


def collective(board: StoreBoard, launch: Launch) -> Finding:
    """An all-reduce over all ranks by the backend that training uses."""
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
    # What each rank sends in a ring, which is what links are compared by.
    rate = 2 * (launch.world_size - 1) / launch.world_size * size * 4 / seconds
    text = f"{backend}, {launch.world_size} ranks: {size * 4 >> 20} MiB in {seconds * 1000:.0f} ms ({gbit(rate)} a rank)"
    if not right:
        return Finding("all-reduce", "broken", f"{text}, but the sum is wrong", "do not train here", needed=True)
    return Finding("all-reduce", "ok", text)


# ---- judging -----------------------------------------------------------------------------------------------------------


def absent(world_size: int, came: dict[int, Any]) -> list[Finding]:
    """Ranks that did not come."""
    missing = [str(rank) for rank in range(world_size) if rank not in came]
    if not missing:
        return []
    detail = f"{len(missing)} of {world_size} ranks did not come: {', '.join(missing[:8])}{', ...' if missing[8:] else ''}"
    return [Finding("network", "broken", detail, "look at their own output", needed=True)]


def judge_pairs(members: Sequence[Member], pairs: Sequence[tuple[int, int]], results: dict[int, Any]) -> list[Finding]:
    """Unreachable pairs, slow pairs, clocks; one line that sums up."""

    def named(number: int) -> str:
        a, b = (members[place] for place in pairs[number])
        return f"{a.node} (rank {a.rank}) and {b.node} (rank {b.rank})"

    findings = []
    for number in range(len(pairs)):
        error = results[number]["error"] if number in results else "no result came"
        if error:
            target = members[pairs[number][1]]
            detail = f"{named(number)} do not reach each other: {error} ({target.address}:{target.port})"
            findings.append(Finding("network", "broken", detail, REACH, needed=True))
    good = {number: result for number, result in results.items() if not result["error"]}
    if not good:
        return findings
    rates = {number: min(result["there"], result["back"]) for number, result in good.items()}
    middle, slowest = statistics.median(rates.values()), min(rates, key=lambda number: rates[number])
    latencies = [result["latency_seconds"] for result in good.values()]
    nodes = len({member.node for member in members})
    text = f"{len(good)} pairs of {nodes} node{'s' if nodes > 1 else ''} by TCP: {gbit(min(rates.values()))} to "
    text += f"{gbit(max(rates.values()))}, latency {min(latencies) * 1e6:.0f} to {max(latencies) * 1e6:.0f} us"
    slow = [number for number, rate in rates.items() if rate < SLOW * middle or rate * 8e-9 < LEAST_GBIT]
    findings.append(Finding("network", "ok", f"{text}, slowest between {named(slowest)}"))
    for number in slow:
        detail = f"{named(number)}: {gbit(rates[number])}, the median is {gbit(middle)}"
        findings.append(Finding("slow pair", "warning", detail, "cable, switch port, or traffic of others"))
    apart = max(good, key=lambda number: abs(good[number]["clock"]))
    seconds = abs(good[apart]["clock"])
    if seconds > CLOCK_SECONDS:
        detail = f"{named(apart)} are {seconds:.1f} s apart"
        findings.append(Finding("clocks", "warning", detail, "synchronise them (chrony, ntp): logs would mislead"))
    else:
        findings.append(Finding("clocks", "ok", f"at most {seconds * 1000:.1f} ms apart"))
    return findings


def judge_versions(found: dict[str, dict[str, str]]) -> list[Finding]:
    """By node. Ranks of other versions may train other things."""
    findings = []
    for name in next(iter(found.values()), {}):
        nodes: dict[str, list[str]] = {}
        for node, known in found.items():
            nodes.setdefault(known.get(name, "none"), []).append(node)
        if len(nodes) > 1:
            detail = "; ".join(f"{version} on {', '.join(on[:4])}{', ...' if on[4:] else ''}" for version, on in nodes.items())
            findings.append(Finding("versions", "broken", f"{name}: {detail}", "install the same on all nodes", needed=True))
    return findings or [Finding("versions", "ok", f"{', '.join(next(iter(found.values()), {}))}: the same on all nodes")]


def judge_probe(members: Sequence[Member], seen: dict[int, Any], folder: Path) -> list[Finding]:
    """Whether other nodes have seen the file that rank 0 wrote."""
    blind = [member.node for member in members if not seen.get(member.rank)]
    if not members:
        return []
    if blind:
        detail = f"{folder.absolute()} is not the same on {', '.join(blind[:8])}{', ...' if blind[8:] else ''}"
        return [Finding("shared folder", "broken", detail, "runs need a folder that all nodes see: --folder", needed=True)]
    return [Finding("shared folder", "ok", f"{folder.absolute()}: what rank 0 writes, the others see")]


def others(board: StoreBoard, own: Sequence[Finding], members: Sequence[Member]) -> list[Finding]:
    """What other nodes found otherwise than rank 0's."""
    same = {(finding.what, finding.state) for finding in own}
    found = board.gather("own", [member.rank for member in members if member.rank])
    nodes = {member.rank: member.node for member in members}
    findings = [(rank, Finding(**one)) for rank, theirs in found.items() for one in theirs]
    return [
        Finding(f"{finding.what} on {nodes[rank]}", finding.state, finding.detail, finding.remedy, finding.needed)
        for rank, finding in findings
        if (finding.what, finding.state) not in same
    ]


# ---- this rank ---------------------------------------------------------------------------------------------------------


def node_name() -> str:
    """As Slurm calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def local_address(address: str, port: int) -> str:
    """This machine's address on the way to rank 0's node: where peers can reach it."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as way:
        way.connect((address, port))  # of a datagram socket: only looks the route up
        return str(way.getsockname()[0])


def _family(address: str) -> socket.AddressFamily:
    family: socket.AddressFamily = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    return family


def versions() -> dict[str, str]:
    """What has to be the same everywhere."""
    packages = ("torch", "megatron-core", "himix-megatron")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def appears(file: Path, seconds: float) -> bool:
    """Whether a file is seen within a time; network file systems remember for some seconds that it was not there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if file.parent.is_dir() and file.name in os.listdir(file.parent):
            return True
        time.sleep(0.5)
    return False


def gbit(bytes_per_second: float) -> str:
    """Gbit/s."""
    return f"{bytes_per_second * 8e-9:.3g} Gbit/s"
