"""Upload of an exported folder to the Hugging Face hub."""

from pathlib import Path

from fedvlm_jax.errors import UserError, explain_error


def upload(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name`, which is made private where it is not there yet; return its address.

    Raises:
        UserError: the hub cannot be reached, or does not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of fedvlm-jax")
    except Exception as error:
        raise UserError(
            f"--push {name}: the hub did not take it ({explain_error(error)}). What was written is in {folder}; sign "
            f"in with `hf auth login`, or upload it later: hf upload {name} {folder}"
        ) from None
    return str(address)
