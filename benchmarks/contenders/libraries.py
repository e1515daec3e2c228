"""Other libraries' checkpoints."""

from torch import nn
from torch.optim import Optimizer

from contenders.protocol import Contender

EVERYWHERE = ["**"]  # with DDP each rank has the same of everything


class Snapshot(Contender):
    """torchsnapshot."""

    def save(self, step: int) -> None:
        from torchsnapshot import Snapshot

        state = {"model": self.model, "optimizer": self.optimizer}
        Snapshot.take(f"{self.url}/{step}", state, replicated=EVERYWHERE)

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot(f"{self.url}/{step}").restore({"model": model, "optimizer": optimizer})


class AsyncSnapshot(Snapshot):
    """It returns when all is copied, or written where that is sooner."""

    def save(self, step: int) -> None:
        from torchsnapshot import Snapshot

        state = {"model": self.model, "optimizer": self.optimizer}
        self.pending = Snapshot.async_take(f"{self.url}/{step}", state, replicated=EVERYWHERE)

    def wait(self) -> None:
        self.pending.wait()


class Fabric(Contender):
    """Lightning's."""

    def join(self) -> None:
        pass  # its own affair, and one rank of its reads what every rank of its reads

    def fabric(self):
        import lightning_fabric

        return lightning_fabric.Fabric(accelerator="cpu", devices=1)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.saver = self.fabric()
        self.model, self.optimizer = self.saver.setup(model, optimizer)

    def save(self, step: int) -> None:
        self.saver.save(f"{self.url}/{step}.ckpt", {"model": self.model, "optimizer": self.optimizer})

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        fabric = self.fabric()
        model, optimizer = fabric.setup(model, optimizer)
        fabric.load(f"{self.url}/{step}.ckpt", {"model": model, "optimizer": optimizer})


class Accelerate(Contender):
    """Hugging Face's."""

    def join(self) -> None:
        pass  # it does so itself

    def accelerator(self):
        import accelerate

        return accelerate.Accelerator(cpu=True)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.saver = self.accelerator()
        self.saver.prepare(model, optimizer)

    def save(self, step: int) -> None:
        self.saver.save_state(f"{self.url}/{step}")

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        accelerator = self.accelerator()
        accelerator.prepare(model, optimizer)
        accelerator.load_state(f"{self.url}/{step}")
