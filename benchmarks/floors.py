"""What the machine takes for the bytes of a state, with nothing around it: no contender can be faster, bar luck.

Every floor is measured beside the contenders, in each round anew. All move as many bytes as the state has.
"""

import errno
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from harness.checkpoint.prefault import Pages, cut
from harness.runtime.threads import in_threads, threads_for

PIECE_BYTES = 16 << 20
PAGE_BYTES = 4096
CONNECTIONS = 8

# What each floor is called, and what it is.
ON_DISK = {
    "naming": "`state_dict()` of model and optimizer, the states of three generators: nothing of the weights",
    "copy_reused": "copy in memory, into pages that are there",
    "copy_fresh": "copy in memory, into fresh pages",
    "hash": "xxh3_128 of the bytes in memory",
    "write": "write and fsync, through the page cache",
    "write_direct": "write and fsync, O_DIRECT",
    "write_direct_beside": "the same, beside the training",
    "write_direct_added": "by which the steps take longer meanwhile",
    "read_warm": "read from the page cache, into pages that are there",
    "read_warm_fresh": "read from the page cache, into fresh pages",
    "read_warm_hashed": "the same, by several threads, which ask for the pages and hash what they read",
    "read_cold": "read from the disk, into pages that are there",
}
ON_S3 = {
    "upload": f"upload of 16 MiB parts over {CONNECTIONS} connections (boto3)",
    "upload_beside": "the same, beside the training",
    "upload_added": "by which the steps take longer meanwhile",
    "download": f"download of 16 MiB ranges over {CONNECTIONS} connections (boto3)",
}


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# Calls a function while a training goes on in another thread; the seconds by which the steps take longer meanwhile.
Beside = Callable[[Callable[[], object]], float]


def disk_floors(folder: str, state: bytes, beside: Beside) -> dict[str, float | None]:
    """Seconds for each; None where the file system or the kernel has no such thing."""
    whole = -(-len(state) // PAGE_BYTES) * PAGE_BYTES
    source = torch.frombuffer(mmap.mmap(-1, whole), dtype=torch.uint8)  # begins at a page, as O_DIRECT wants
    source.numpy()[: len(state)] = np.frombuffer(state, np.uint8)
    target = torch.ones_like(source)
    found: dict[str, float | None] = {"copy_reused": seconds(lambda: target.copy_(source))}
    found["copy_fresh"] = seconds(lambda: torch.empty(whole, dtype=torch.uint8).copy_(source))
    found["hash"] = seconds(lambda: xxhash.xxh3_128(source.numpy()).digest())
    path = f"{folder}/floor"
    found["write_direct"] = _write(path, source, os.O_DIRECT)
    added = beside(lambda: found.update(write_direct_beside=_write(path, source, os.O_DIRECT)))
    found["write_direct_added"] = None if found["write_direct"] is None else added
    found["write"] = _write(path, source, 0)
    found["read_warm"] = seconds(lambda: _read(path, target))
    found["read_warm_fresh"] = seconds(lambda: _read(path, torch.empty_like(target)))
    found["read_warm_hashed"] = seconds(lambda: _read_hashed(path, torch.empty_like(target)))
    forget_cached([path])
    found["read_cold"] = seconds(lambda: _read(path, target))
    assert target.equal(source)
    os.unlink(path)
    return found


def _write(path: str, source: torch.Tensor, further_flags: int) -> float | None:
    """To a new file, in pieces."""
    os.sync()
    view = memoryview(source.numpy())
    began = time.perf_counter()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | further_flags)
        try:
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                while piece:
                    piece = piece[os.write(file, piece) :]
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    return time.perf_counter() - began


def _read(path: str, target: torch.Tensor) -> None:
    view = memoryview(target.numpy())
    with open(path, "rb", buffering=0) as file:
        while view:
            view = view[file.readinto(view[:PIECE_BYTES]) :]


def _read_hashed(path: str, target: torch.Tensor) -> None:
    """What is left of a restore that owns the bytes and has checked them, when there is nothing but these bytes."""
    pages = Pages(target.nbytes)
    with open(path, "rb", buffering=0) as file:

        def take(stretch: tuple[int, memoryview]) -> None:
            start, place = stretch
            pages.give(place)
            assert os.preadv(file.fileno(), [place], start) == len(place)
            xxhash.xxh3_128(place).digest()

        in_threads(threads_for(target.nbytes), take, cut(memoryview(target.numpy())))


def forget_cached(paths: list[str]) -> None:
    """Has the kernel drop its copy of what is in files."""
    os.sync()  # only what is on the disk can be dropped
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def back_free_memory(size_bytes: int) -> None:
    """Has a host give this machine memory for so many free bytes, if it is a virtual one that gives free memory back."""
    block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, size_bytes, PAGE_BYTES):
        block[start] = 1
    block.close()


def s3_floors(uploads: "Uploads", objects: Sequence[bytes], beside: Beside) -> dict[str, float]:
    """Uploads and downloads of objects with a client that does nothing else."""
    found = {"upload": seconds(lambda: uploads.add(objects))}
    found["upload_added"] = beside(lambda: found.update(upload_beside=seconds(lambda: uploads.add(objects))))
    targets = [bytearray(len(each)) for each in objects]
    found["download"] = seconds(lambda: uploads.get(targets))
    assert targets == list(objects)
    return found


class Uploads:
    """Objects below a URL, named 0, 1, 2, …, written and read with boto3.

    They should be what a checkpoint consists of, and each goes to a new key. The server looks at the first 128 bytes of some
    MiB to decide whether it compresses them: other bytes, or the same ones in other objects, are another load. And it clears
    up behind what is overwritten.
    """

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        config = Config(max_pool_connections=CONNECTIONS, request_checksum_calculation="when_required")
        self.client = boto3.client("s3", config=config)
        self.bucket, _, self.prefix = url.removeprefix("s3://").partition("/")
        self.count = 0

    def place(self, number: int) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{number}"}

    def add(self, objects: Sequence[bytes]) -> None:
        """All side by side, in parts."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for complete in [self._begin(pool, each) for each in objects]:
                complete()

    def _begin(self, pool: ThreadPoolExecutor, data: bytes) -> Callable[[], object]:
        """Has the parts sent; what it returns waits for them."""
        place, view = self.place(self.count), memoryview(data)
        self.count += 1
        upload = {**place, "UploadId": self.client.create_multipart_upload(**place)["UploadId"]}

        def send(number: int) -> dict[str, object]:
            start = (number - 1) * PIECE_BYTES
            body = bytes(view[start : start + PIECE_BYTES])
            return {"PartNumber": number, "ETag": self.client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]}

        parts = pool.map(send, range(1, -(-len(data) // PIECE_BYTES) + 1))
        return lambda: self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": list(parts)})

    def get(self, targets: Sequence[bytearray]) -> None:
        """The objects that were added first, in ranges."""

        def receive(number: int, start: int) -> None:
            end = min(start + PIECE_BYTES, len(targets[number]))
            reply = self.client.get_object(**self.place(number), Range=f"bytes={start}-{end - 1}")
            memoryview(targets[number])[start:end] = reply["Body"].read()

        ranges = [(number, at) for number, each in enumerate(targets) for at in range(0, len(each), PIECE_BYTES)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(receive, *zip(*ranges, strict=True)))
