"""Ways to damage a dataset of three shards, for test_dataset_corruptions.py.

A damage is the files it changes, as {path in the folder: content, or None for no file}. Each kind yields (files, names that
must be reported, whether reading must notice), from the folder and its contents by path.
"""

import tarfile
from itertools import permutations

from himix_megatron.data.shards import shard_format

SHARDS = ["set-000000", "set-000001", "set-000002"]
MANIFEST = "manifest.json"


def tar_of(shard):
    return f"shards/{shard}.tar"


def index_of(shard):
    return f"shards/{shard}.idx"


def receipt_of(shard):
    return f"receipts/{shard}.json"


def lengths_of(whole, shard):
    return next(path for path in whole if path.endswith(f"{shard}.text"))


def flipped(data, place, bit):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def members_of(folder, shard):
    with tarfile.open(folder / tar_of(shard)) as tar:
        return [(member.name, member.offset, tar.extractfile(member).read()) for member in tar]


def packed(members):
    """A tar of (name, content)."""
    blocks = [shard_format.tar_header(name, len(data)) + data + shard_format.padding(len(data)) for name, data in members]
    return b"".join(blocks) + shard_format.TAR_END


def truncations(folder, whole):
    """At every block, and inside of some."""
    for shard in SHARDS:
        data = whole[tar_of(shard)]
        for length in [*range(0, len(data), 512), *range(100, len(data), 2048)]:
            yield {tar_of(shard): data[:length]}, {shard}, True
        for length in range(0, len(whole[index_of(shard)]), 32):
            yield {index_of(shard): whole[index_of(shard)][:length]}, {shard}, True


def flips_in_headers(folder, whole):
    """Name, mode, size, time, checksum, type, magic, prefix. A reader by index does not look at headers."""
    for shard in SHARDS:
        for number, (_, offset, _) in enumerate(members_of(folder, shard)):
            for place in (0, 9, 101, 133, 146, 150, 156, 258, 346):
                yield {tar_of(shard): flipped(whole[tar_of(shard)], offset + place, number % 8)}, {shard}, False


def flips_in_contents(folder, whole):
    for shard in SHARDS:
        for number, (_, offset, data) in enumerate(members_of(folder, shard)):
            for place in (0, len(data) // 3, len(data) - 1):
                yield {tar_of(shard): flipped(whole[tar_of(shard)], offset + 512 + place, number % 8)}, {shard}, True


def flips_behind_contents(folder, whole):
    for shard in SHARDS:
        data = whole[tar_of(shard)]
        for _, offset, content in members_of(folder, shard):
            if len(content) % 512:
                yield {tar_of(shard): flipped(data, offset + 512 + len(content), 3)}, {shard}, False
        for place in (-1, -512, -1024):
            yield {tar_of(shard): flipped(data, len(data) + place, 0)}, {shard}, False


def flips_in_indexes(folder, whole):
    for shard in SHARDS:
        data = whole[index_of(shard)]
        for place in range(0, len(data), 7):
            yield {index_of(shard): flipped(data, place, place % 8)}, {shard}, True


def flips_in_receipts(folder, whole):
    for shard in SHARDS:
        data = whole[receipt_of(shard)]
        for place in range(0, len(data), 31):
            yield {receipt_of(shard): flipped(data, place, place % 8)}, {shard}, False


def damage_to_lengths(folder, whole):
    """The column of text lengths: a run that finds such a one makes it again."""
    for shard, other in zip(SHARDS, SHARDS[1:] + SHARDS[:1], strict=True):
        path = lengths_of(whole, shard)
        for place in range(0, len(whole[path]), 5):
            yield {path: flipped(whole[path], place, place % 8)}, {shard}, False
        for length in range(0, len(whole[path]), 8):
            yield {path: whole[path][:length]}, {shard}, False
        yield {path: whole[lengths_of(whole, other)]}, {shard}, False


def flips_in_the_manifest(folder, whole):
    data = whole[MANIFEST]
    for place in range(0, len(data), 61):
        yield {MANIFEST: flipped(data, place, place % 8)}, {MANIFEST}, True


def zeroed_blocks(folder, whole):
    for shard in SHARDS:
        data = whole[tar_of(shard)]
        headers = {offset for _, offset, _ in members_of(folder, shard)}
        for start in range(0, len(data) - 1024, 512):
            yield {tar_of(shard): data[:start] + bytes(512) + data[start + 512 :]}, {shard}, start not in headers


def appended_bytes(folder, whole):
    for shard in SHARDS:
        for part in (tar_of(shard), index_of(shard), receipt_of(shard)):
            for more in (b"\0", b"\n", bytes(512), whole[part]):
                yield {part: whole[part] + more}, {shard}, part != receipt_of(shard)


def missing_files(folder, whole):
    for shard in SHARDS:
        parts = [tar_of(shard), index_of(shard), receipt_of(shard)]
        for part in parts:
            yield {part: None}, {shard}, part != receipt_of(shard)
        yield dict.fromkeys(parts), {shard}, True
    yield {f"quarantine/{SHARDS[2]}.jsonl": None}, {SHARDS[2]}, False
    yield {f"quarantine/{SHARDS[2]}.jsonl": b""}, {SHARDS[2]}, False
    yield {MANIFEST: None}, {MANIFEST}, True


def swapped_files(folder, whole):
    """Each file of a shard, and all of them, for those of each other shard; one way and both ways."""
    for one, other in permutations(SHARDS, 2):
        ways = [[tar_of], [index_of], [receipt_of], [tar_of, index_of], [tar_of, index_of, receipt_of]]
        for parts in ways:
            there = {part(one): whole[part(other)] for part in parts}
            back = {part(other): whole[part(one)] for part in parts}
            yield there, {one}, parts != [receipt_of]
            if one < other:
                yield there | back, {one, other}, parts != [receipt_of]


def lost_members(folder, whole):
    for shard in SHARDS:
        members = [(name, data) for name, _, data in members_of(folder, shard)]
        for n in range(len(members)):
            yield {tar_of(shard): packed(members[:n] + members[n + 1 :])}, {shard}, True


def swapped_members(folder, whole):
    """Whole members with their neighbours; contents under each other's headers."""
    for shard in SHARDS:
        members = [(name, data) for name, _, data in members_of(folder, shard)]
        for n in range(len(members) - 1):
            (first, data), (second, others) = members[n : n + 2]
            rest = members[n + 2 :]
            yield {tar_of(shard): packed([*members[:n], (second, others), (first, data), *rest])}, {shard}, data != others
            if data != others:
                yield {tar_of(shard): packed([*members[:n], (first, others), (second, data), *rest])}, {shard}, True


def added_members(folder, whole):
    """A second copy, a stranger and a member of another name, at every place."""
    for shard in SHARDS:
        members = [(name, data) for name, _, data in members_of(folder, shard)]
        for n, (name, data) in enumerate(members):
            yield {tar_of(shard): packed([*members[:n], members[n], *members[n:]])}, {shard}, True
            yield {tar_of(shard): packed([*members[:n], ("000000099.json", b"{}"), *members[n:]])}, {shard}, True
            yield {tar_of(shard): packed([*members[:n], ("../" + name, data), *members[n + 1 :]])}, {shard}, False


def extra_files(folder, whole):
    yield {"shards/set-000003.tar": whole[tar_of(SHARDS[0])]}, {"shards/set-000003.tar"}, False
    yield {"shards/set-000003.idx": whole[index_of(SHARDS[0])]}, {"shards/set-000003.idx"}, False
    yield {"receipts/set-000003.json": whole[receipt_of(SHARDS[0])]}, {"receipts/set-000003.json"}, False
    yield {f"quarantine/{SHARDS[0]}.jsonl": b'{"row": 0}\n'}, {SHARDS[0]}, False
    yield {"shards/notes.txt": b"mine"}, {"shards/notes.txt"}, False


KINDS = [
    *(truncations, flips_in_headers, flips_in_contents, flips_behind_contents, flips_in_indexes, flips_in_receipts),
    damage_to_lengths,
    *(flips_in_the_manifest, zeroed_blocks, appended_bytes, missing_files, swapped_files, lost_members, swapped_members),
    *(added_members, extra_files),
]
