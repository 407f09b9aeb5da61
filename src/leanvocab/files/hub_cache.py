"""Names on the hub → folders of its cache on this machine; nothing is fetched."""

from pathlib import Path


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a name in the hub's cache, of its main revision unless another is named; None where it is not there."""
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # the hub's errors have no common base
        return None
