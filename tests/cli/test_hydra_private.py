"""The private names of Hydra that `cli/hydra_private.py` uses."""

from tests.private_names import private

NO_CONFIGURATION = (
    "no configuration can be composed, so no verb that takes key=value works; see cli/hydra_private.py"
)


def test_the_loader() -> None:
    place = "hydra._internal.config_loader_impl:ConfigLoaderImpl"
    loader = private("hydra-core", place, NO_CONFIGURATION, ["config_search_path"])
    names = [
        "self", "config_name", "overrides", "run_mode", "from_shell", "validate_sweep_overrides",
    ]  # fmt: skip
    private("hydra-core", f"{place}.load_configuration", NO_CONFIGURATION, names)
    assert loader


def test_the_search_path() -> None:
    place = "hydra._internal.config_search_path_impl:ConfigSearchPathImpl"
    private("hydra-core", place, NO_CONFIGURATION, [])
    private("hydra-core", f"{place}.append", NO_CONFIGURATION, ["self", "provider", "path"])
