import atexit
import collections
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import jax
import pytest

import wnn_jax
from tests.helpers import WINDOWS, all_optimizations

# Before anything makes an array: the number of devices is fixed by the first use of them.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
if "JAX_PLATFORMS" not in os.environ:  # Set it to run the tests on an accelerator.
    jax.config.update("jax_platforms", "cpu")

# Many tests train the same few models: what is compiled is kept for all processes of a session, which are children of
# the one that gets here first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache_folder = tempfile.mkdtemp(prefix="wnn-jax-tests-")
    atexit.register(shutil.rmtree, cache_folder, ignore_errors=True)
    for name, value in {
        "jax_compilation_cache_dir": cache_folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is `slow_but(n)`, the first n that are not slow on their own are quick."""
    num_cases = collections.Counter[str]()
    for item in items:
        mark = item.get_closest_marker("slow_but")
        if mark and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            num_cases[test] += 1
            if num_cases[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Forgets compiled programs when there are many: each takes some of the 65,530 maps that Linux gives a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized() -> Generator[None]:
    """For modules in which programs are to be as a user has them."""
    with all_optimizations():
        yield


@pytest.fixture
def optimized_here() -> Generator[None]:
    """For single tests, in which two programs are to agree to the last bit."""
    jax.clear_caches()  # A program that was compiled before would be used as it is.
    with all_optimizations():
        yield


@pytest.fixture(scope="session")
def wnn() -> wnn_jax.nowcasters.WNN:
    """An untrained network. What it forecasts is of no use, but finite and different from the last snapshot."""
    init = jax.jit(lambda key: dict(wnn_jax.nowcasters.WNN.init(key).params))
    return wnn_jax.nowcasters.WNN(init(jax.random.key(0)))


@pytest.fixture(scope="session")
def wnn_plus() -> wnn_jax.nowcasters.WNNPlus:
    """An untrained network, a narrow one."""
    init = jax.jit(lambda key: dict(wnn_jax.nowcasters.WNNPlus.init(key, width=16).params))
    return wnn_jax.nowcasters.WNNPlus(init(jax.random.key(0)))


@pytest.fixture(scope="session", params=[*WINDOWS, "drift"])
def nowcaster(request: pytest.FixtureRequest) -> str | wnn_jax.Nowcaster:
    """A closed form on whole leaves, a network on chunks of them that is told of the whole leaf too, and a drift."""
    return request.getfixturevalue(request.param) if request.param == "wnn_plus" else request.param
