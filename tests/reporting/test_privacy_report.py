"""What a report says of a private run's noise beside the updates that it hides."""

import json

from made_up import write_run

from fedvlm_jax.cli._closing import close_run
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.reporting.privacy_report import describe_noise, draw_epsilon
from fedvlm_jax.run_dir.reader import read_run

PRIVACY = {
    "noise": 1.0397,
    "clip": 1.0,
    "quantile": None,
    "delta": 1e-05,
    "limit": 8.0,
    "rounds": 3,
    "epsilon": 7.9993235638445395,
    "mechanism": "gaussian",
    "sampling": "all",
    "clients": 16,
    "expected": 16.0,
    "places": 16,
    "chance": 1.0,
    "groups": 1,
    "covers": "-",
    "does_not_cover": "-",
}


def write(folder, ratios):
    write_run(folder, {"a": 0.1}, {"a": 0.5}, Run())
    lines = [
        {"round": number, "loss": 1.0} | ({} if ratio is None else {"noise_to_update": ratio})
        for number, ratio in enumerate(ratios, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((folder / "results.json").read_text())
    results["privacy"] = PRIVACY
    (folder / "results.json").write_text(json.dumps(results))
    return read_run(folder)


def test_the_median_round_s_noise_is_told_where_it_is_large_and_where_it_is_not(tmp_path):
    large = write(tmp_path / "large", [119, 40, None, 2000])
    assert describe_noise(large) == [
        "In the median round the noise was 119 times as long as the sum of the updates: what is shared is mostly noise."
    ]
    assert close_run(large)[-1] == describe_noise(large)[0]
    (small,) = describe_noise(write(tmp_path / "small", [0.25, 0.5]))
    assert small.endswith("was 0.375 times as long as the sum of the updates.")
    assert describe_noise(write(tmp_path / "empty", [None])) == []


def test_it_is_drawn_beside_epsilon(tmp_path):
    ax = draw_epsilon(write(tmp_path / "r", [3, None, 5])).axes[1]
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [3, 5]]
    assert ax.get_title("left") == "Noise over the sum of updates"
