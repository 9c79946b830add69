"""Downloads that fail at once where there is no network: timm and its hub would try again for a minute."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub
import torch
from huggingface_hub import constants

from qat.errors import QatError

PATIENCE = 3.0  # seconds that a host may take to answer
STORED = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "config.json"


@contextmanager
def quickly(repo: str | None, files: tuple[str, ...] = (), url: str | None = None) -> Iterator[None]:
    """Let a download of the block run where its host answers; otherwise only what was downloaded before is used.

    Args:
        repo: name on the Hugging Face hub, or None.
        files: any of these is enough; by default the usual names of weights.
        url: where the file is, if it is not on the hub.

    Raises:
        QatError: the host does not answer, and the file was not downloaded before.
    """
    address = constants.ENDPOINT if repo else url
    if address is None or (answers(address) and not (repo and constants.HF_HUB_OFFLINE)):
        yield
        return
    if not (_is_cached(repo, files or STORED) if repo else _is_downloaded(str(url))):
        raise QatError(f"{urlsplit(address).hostname} does not answer, and the file was not downloaded before")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def source_of(cfg: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """The arguments of `quickly` for the weights that a configuration of timm names."""
    if cfg.get("file"):  # a folder or file of this machine
        return {"repo": None}
    if repo := cfg.get("hf_hub_id"):
        repo = f"{repo}{arch}" if str(repo).endswith("/") else repo
        named = cfg.get("hf_hub_filename")
        return {"repo": repo, "files": (named,) if named else ()}
    return {"repo": None, "url": cfg.get("url")}


def answers(address: str) -> bool:
    """Whether the host of an address, or the proxy that stands before it, accepts a connection within seconds."""
    parts = urlsplit(address)
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    if proxy and parts.hostname and not proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connected: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname, port), timeout=PATIENCE).close()
            connected.append(True)
        except OSError:
            connected.append(False)

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(PATIENCE)
    return connected == [True]


def _is_cached(repo: str | None, files: tuple[str, ...]) -> bool:
    name, _, revision = str(repo).partition("@")
    found = (huggingface_hub.try_to_load_from_cache(name, file, revision=revision or None) for file in files)
    return any(isinstance(path, str) for path in found)


def _is_downloaded(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlsplit(url).path)).exists()
