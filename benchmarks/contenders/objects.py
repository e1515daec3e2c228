"""What is written to S3 by others. The address and the keys are in the environment (``AWS_ENDPOINT_URL`` and so on)."""

import os

import fsspec
import torch
import torch.distributed.checkpoint as dcp

from contenders.dcp import Save
from contenders.plain import TorchSave


class S3fs(TorchSave):
    """``torch.save`` and ``torch.load`` with a file that s3fs opened."""

    def save(self, step: int) -> None:
        with fsspec.open(self.path(step), "wb") as file:
            torch.save(self.state(), file)

    def load(self, step: int) -> dict[str, dict]:
        with fsspec.open(self.path(step), "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


class S3Connector(Save):
    """DCP with the writer and the reader of s3torchconnector."""

    def writer(self, step: int) -> dcp.StorageWriter:
        from s3torchconnector.dcp import S3StorageWriter

        writer = S3StorageWriter(_region(), f"{self.url}/{step}")
        writer.fs = _file_system()
        return writer

    def reader(self, step: int) -> dcp.StorageReader:
        from s3torchconnector.dcp import S3StorageReader

        reader = S3StorageReader(_region(), f"{self.url}/{step}")
        reader.fs = _file_system(reader._reader_constructor)
        return reader


def _region() -> str:
    return os.environ["AWS_DEFAULT_REGION"]


def _file_system(reader_constructor=None):
    """It takes an address of a server only here."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp.s3_file_system import S3FileSystem

    config = S3ClientConfig(force_path_style=True)
    client = S3Client(_region(), endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=config)
    return S3FileSystem(_region(), s3_client=client, reader_constructor=reader_constructor)
