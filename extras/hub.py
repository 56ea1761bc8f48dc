"""The hub: its client, huggingface_hub, is optional, and knows cache, mirrors and tokens."""
from pathlib import Path

from extras.pickles import DataError

LLM_FILES = ["*.json", "*.model", "*.tiktoken", "merges.txt", "*.safetensors"]
HUB_ADVICE = {      # for each kind of error of its client
    "ModuleNotFoundError": "pip install huggingface_hub",
    "RepositoryNotFoundError": "check the name; if it is private, run: hf auth login",
    "GatedRepoError": "accept the licence on its page at the hub, make a token there, run: hf auth login",
}

def hub_folder(repo: str, kind: str, files: list, fetch: bool) -> Path | None:
    """Where the hub's client keeps files of a "model" or "dataset". fetch: get them first, or DataError."""
    inner = "*/*" if kind == "model" else None          # a model's folders hold other formats
    try:
        from huggingface_hub import snapshot_download   # optional
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=files, ignore_patterns=inner,
                                      local_files_only=not fetch))
    except Exception as error:      # whatever its client raises
        if not fetch:
            return None
        reason = " ".join(str(error).split())[:200]
        advice = HUB_ADVICE.get(type(error).__name__, "check the network and the name")
        raise DataError(f"{repo} cannot be fetched ({reason}): {advice}; or by hand: "
                        f"hf download {repo} --repo-type {kind}") from None
