"""torch.distributed.checkpoint, in the forms that it offers."""

from concurrent.futures import Future

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.optim import Optimizer

from contenders.protocol import Contender


class Save(Contender):
    """``dcp.save`` with FileSystemWriter, whose default is one thread and one file."""

    threads = 1

    def writer(self, step: int) -> dcp.StorageWriter:
        return dcp.FileSystemWriter(f"{self.url}/{step}", thread_count=self.threads)

    def reader(self, step: int) -> dcp.StorageReader:
        return dcp.FileSystemReader(f"{self.url}/{step}")

    def state(self, model: nn.Module, optimizer: Optimizer) -> dict:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def save(self, step: int) -> None:
        dcp.save(self.state(self.model, self.optimizer), storage_writer=self.writer(step))

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        state = self.state(model, optimizer)
        dcp.load(state, storage_reader=self.reader(step))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


class TwoThreads(Save):
    threads = 2


class Fsspec(Save):
    """On any file system of fsspec."""

    def writer(self, step: int) -> dcp.StorageWriter:
        return FsspecWriter(f"{self.url}/{step}")

    def reader(self, step: int) -> dcp.StorageReader:
        return FsspecReader(f"{self.url}/{step}")


class AsyncThread(Save):
    """``dcp.async_save`` with its defaults: a fresh copy, made before it returns, and a thread that writes it."""

    kind = AsyncCheckpointerType.THREAD
    stager: AsyncStager | None = None
    staged: Future | None = None
    written: Future

    def save(self, step: int) -> None:
        response = dcp.async_save(
            self.state(self.model, self.optimizer),
            storage_writer=self.writer(step),
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        if isinstance(response, AsyncSaveResponse):
            self.staged, self.written = response.staging_completion, response.upload_completion
        else:
            self.written = response

    def fence(self) -> None:
        if self.staged is not None:
            self.staged.result()

    def wait(self) -> None:
        self.written.result()

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class AsyncStaged(AsyncThread):
    """The copy is made in a thread beside the forward and backward passes, into buffers that are kept."""

    shares_memory = False

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().prepare(model, optimizer)
        options = StagingOptions(
            use_pinned_memory=False,  # this and the last need an accelerator
            use_shared_memory=self.shares_memory,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        self.stager = DefaultStager(options)


class AsyncProcess(AsyncStaged):
    """The same, and a process that writes."""

    kind = AsyncCheckpointerType.PROCESS
    shares_memory = True

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().prepare(model, optimizer)
        if not dist.is_initialized():  # the process is given a place in a group of its own
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
