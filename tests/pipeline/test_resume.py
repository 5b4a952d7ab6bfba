"""The chain skips, resumes, runs or refuses each stage, and reuses or overwrites nothing silently."""

import copy
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chains import chain, composed
from omegaconf import OmegaConf

from ldm_train.configuration import differences
from ldm_train.errors import Refused
from ldm_train.pipeline import resume as stages
from ldm_train.pipeline.resume import (
    Order,
    Step,
    advance,
    check_chain,
    decide,
    made_anew,
    read_note,
    run_lock,
    set_aside,
)
from ldm_train.pipeline.run import Run, option_defaults
from ldm_train.training.fit import Machine

KEY = {"autoencoder": {"lr": 1e-3, "loss": {"disc_start": 8, "betas": [0.5, 0.9]}}, "seed": 0}

ORDER = Order(
    {
        "autoencoder": ((), "sha256"),
        "latents": (("autoencoder",), "content"),
        "diffusion": (("latents",), "sha256"),
        "evaluation": (("diffusion",), "samples"),
        "export": (("diffusion",), "folder"),
        "classifier": (("latents",), "sha256"),
        "perceptual": ((), "sha256"),
    }
)


class Work:
    """A stage that counts its calls and fails if told to."""

    def __init__(self, fails: bool = False):
        self.calls, self.fails = 0, fails

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        assert folder.is_dir()
        if self.fails:
            raise RuntimeError("interrupted")
        return {"sha256": "abc"}


def stage(work: Work, steps: int = 10, name: str = "autoencoder", **changes: Any) -> Step:
    return Step(name, lambda: KEY | changes, work, steps)


def test_a_new_stage_runs_and_a_finished_one_is_skipped(tmp_path: Path):
    work = Work()
    assert [advance(stage(work), tmp_path, {}, True) for _ in range(3)] == ["run", "skip", "skip"]
    assert work.calls == 1
    assert ORDER.result_of(tmp_path, "autoencoder", "sha256") == "abc"
    assert read_note(tmp_path / "autoencoder") == {
        "key": KEY,
        "finished": True,
        "steps": 10,
        "result": {"sha256": "abc"},
    }


def test_an_interrupted_stage_resumes(tmp_path: Path):
    with pytest.raises(RuntimeError, match="interrupted"):
        advance(stage(Work(fails=True)), tmp_path, {}, True)
    with pytest.raises(Refused, match=r"no finished stage 'autoencoder' yet; run it first: stages=\[autoencoder\]"):
        ORDER.result_of(tmp_path, "autoencoder", "sha256")
    assert advance(stage(Work()), tmp_path, {}, True) == "resume"
    assert decide(stage(Work()), tmp_path, {}) == "skip"


def test_more_steps_continue_and_fewer_do_not(tmp_path: Path):
    advance(stage(Work()), tmp_path, {}, True)
    assert decide(stage(Work(), steps=5), tmp_path, {}) == "skip"
    assert advance(stage(Work(), steps=20), tmp_path, {}, True) == "resume"
    assert decide(stage(Work(), steps=20), tmp_path, {}) == "skip"


def test_fewer_steps_than_an_interrupted_stage_has_are_refused(trained: Path, tmp_path: Path):
    """Its weights would be recorded as those of the fewer steps."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluation")
    shutil.rmtree(tmp_path / "run" / "export")
    note = tmp_path / "run/diffusion/stage.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"finished": False}))
    run = chain(tmp_path, "diffusion.max_steps=2", f"data_dir={trained}")
    timed = chain(tmp_path, "diffusion.max_steps=2", "diffusion.max_time=1h", f"data_dir={trained}")
    timed._check_steps(timed.chosen())  # ended by the clock, after any number of steps
    with pytest.raises(
        Refused, match=r"diffusion has 6 steps and diffusion\.max_steps=2 asks for fewer; .*max_steps=6"
    ):
        run.prepare()


def test_other_settings_are_refused_by_name(tmp_path: Path):
    advance(stage(Work()), tmp_path, {}, True)
    work = Work()
    with pytest.raises(Refused) as caught:
        advance(
            stage(work, seed=1, autoencoder={"lr": 2e-3, "loss": {"disc_start": 8, "betas": [0.5, 0.9]}}),
            tmp_path,
            {},
            True,
        )
    message = str(caught.value)
    assert "autoencoder.lr: 0.001 -> 0.002" in message
    assert "seed: 0 -> 1" in message
    assert "disc_start" not in message
    assert "name=<new>" in message
    assert "restart=autoencoder" in message
    assert work.calls == 0
    assert decide(stage(Work()), tmp_path, {}) == "skip"  # the refusal changed nothing


def test_an_unfinished_stage_is_not_resumed_with_other_settings(tmp_path: Path):
    with pytest.raises(RuntimeError):
        advance(stage(Work(fails=True)), tmp_path, {}, True)
    with pytest.raises(Refused, match="seed: 0 -> 1"):
        decide(stage(Work(), seed=1), tmp_path, {})


def test_an_absent_option_equals_its_default():
    defaults = {"autoencoder": {"clip_norm": None, "compile": False, "loss": {"ramp": 0}}}
    old = {"autoencoder": {"lr": 1e-3}}
    new = {"autoencoder": {"lr": 1e-3, "compile": False, "clip_norm": None, "loss": {"ramp": 0}}}
    assert differences(old, new, defaults) == differences(new, old, defaults) == []
    new["autoencoder"]["loss"]["ramp"] = 5
    assert differences(old, new, defaults) == ["autoencoder.loss.ramp: 0 -> 5"]
    assert differences({}, {"data": {"crop": "center"}}, defaults) == ["data.crop: None -> center"]


def test_the_order_of_conditioners_is_a_setting_and_that_of_options_is_not():
    def tree(*names: str) -> dict:
        return {"diffusion": {"conditioning": {"conditioners": {name: {"dim": 8} for name in names}}}}

    said = ["diffusion.conditioning.conditioners: ['class', 'text'] -> ['text', 'class'], another order"]
    assert differences(tree("class", "text"), tree("text", "class"), {}) == said
    assert differences(tree("class"), tree("class", "text"), {}) == [
        "diffusion.conditioning.conditioners.text.dim: None -> 8"
    ]
    assert differences({"seed": 0, "lr": 1}, {"lr": 1, "seed": 0}, {}) == []


def test_a_stage_whose_options_others_use_is_compared_where_it_is_not_chosen(tmp_path: Path):
    advance(stage(Work()), tmp_path, {}, True)
    only = [stage(Work(), name="latents")]
    check_chain(ORDER, only, tmp_path, {}, binding=[stage(Work())])
    with pytest.raises(Refused, match=r"autoencoder was made with other settings:\n  seed: 0 -> 1"):
        check_chain(ORDER, only, tmp_path, {}, binding=[stage(Work(), seed=1)])


def test_lists_are_values():
    assert differences({"a": [1, 2]}, {"a": [1, 2]}, {}) == []
    assert differences({"a": [1, 2]}, {"a": [2, 1]}, {}) == ["a: [1, 2] -> [2, 1]"]


def test_tuples_and_lists_are_one_after_a_restart(tmp_path: Path):
    advance(Step("export", lambda: {"size": (32, 32)}, Work()), tmp_path, {}, True)
    assert decide(Step("export", lambda: {"size": [32, 32]}, Work()), tmp_path, {}) == "skip"


def test_only_the_writer_writes(tmp_path: Path):
    (tmp_path / "autoencoder").mkdir()
    work = Work()
    assert advance(stage(work), tmp_path, {}, writer=False) == "run"
    assert work.calls == 1
    assert list((tmp_path / "autoencoder").iterdir()) == []


def test_a_restart_sets_the_stage_and_later_ones_aside(tmp_path: Path):
    for name in ("autoencoder", "latents", "diffusion"):
        advance(stage(Work(), name=name), tmp_path, {}, True)
        (tmp_path / name / "made").write_text(name)
    set_aside(tmp_path, ["latents", *ORDER.later_than("latents")])
    assert (tmp_path / "autoencoder" / "made").is_file()
    assert not (tmp_path / "latents").exists()
    assert not (tmp_path / "diffusion").exists()
    kept = sorted((tmp_path / ".replaced").iterdir())
    assert [p.name.split("-")[0] for p in kept] == ["diffusion", "latents"]
    assert [(p / "made").read_text() for p in kept] == ["diffusion", "latents"]
    assert decide(stage(Work(), name="latents", seed=1), tmp_path, {}) == "run"


def test_a_restart_that_would_leave_nothing_to_go_on_from_is_refused_before_anything_moves(tmp_path: Path):
    for name in ("autoencoder", "latents", "diffusion", "export"):
        advance(stage(Work(), name=name), tmp_path, {}, True)
    before = sorted(p.name for p in tmp_path.iterdir())
    only = [stage(Work(), name="diffusion")]
    with pytest.raises(Refused, match=r"restart=latents is not in stages=\[diffusion\]"):
        check_chain(ORDER, only, tmp_path, {}, restart="latents")
    both = [stage(Work(), name="autoencoder"), stage(Work(), name="diffusion")]
    with pytest.raises(Refused, match="sets latents aside, which diffusion needs"):
        check_chain(ORDER, both, tmp_path, {}, restart="autoencoder")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    check_chain(ORDER, [stage(Work(), name=n) for n in ("latents", "diffusion")], tmp_path, {}, restart="latents")


def test_training_further_needs_one_restart_which_sets_all_aside_that_would_no_longer_belong(tmp_path: Path):
    names = ("autoencoder", "latents", "diffusion", "evaluation", "export")
    for name in names:
        advance(stage(Work(), name=name, steps=10 if name in ("autoencoder", "diffusion") else 0), tmp_path, {}, True)
    further = [stage(Work(), name=n, steps={"autoencoder": 10, "diffusion": 20}.get(n, 0)) for n in names]
    with pytest.raises(Refused, match="Choose restart=evaluation"):
        check_chain(ORDER, further, tmp_path, {})
    check_chain(ORDER, further, tmp_path, {}, restart="evaluation")
    assert made_anew(ORDER, further, tmp_path, "evaluation") == ["evaluation", "export"]
    same = [stage(Work(), name=n, steps=10 if n in ("autoencoder", "diffusion") else 0) for n in names]
    assert made_anew(ORDER, same, tmp_path, "evaluation") == ["evaluation"]
    assert made_anew(ORDER, same, tmp_path, None) == []


def test_a_restart_leaves_alone_what_does_not_follow_from_it():
    assert ORDER.later_than("evaluation") == []
    assert ORDER.leading_to("export") == ["autoencoder", "latents", "diffusion", "export"]


def test_a_damaged_sibling_of_a_sweep_is_passed_over(tmp_path: Path):
    advance(stage(Work()), tmp_path / "b", {}, True, share=True)
    (tmp_path / "a" / "autoencoder").mkdir(parents=True)
    (tmp_path / "a" / "autoencoder" / "stage.json").write_text("{")
    (tmp_path / "c").mkdir()
    assert advance(stage(Work()), tmp_path / "c", {}, True, share=True) == "share"


def test_two_restarts_in_one_second_keep_both(tmp_path: Path):
    for text in ("first", "second"):
        advance(stage(Work(), name="export"), tmp_path, {}, True)
        (tmp_path / "export" / "made").write_text(text)
        set_aside(tmp_path, ["export"])
    assert sorted(p.read_text() for p in (tmp_path / ".replaced").glob("*/made")) == ["first", "second"]


def test_one_process_at_a_time_works_in_a_run(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from ldm_train.pipeline.resume import Refused, run_lock\n"
        f"try:\n    with run_lock(Path({str(tmp_path)!r})): print('inside')\nexcept Refused as error: print(error)"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with run_lock(tmp_path):
        assert "another process is working in" in other()
        with pytest.raises(Refused, match="wait for it, or choose name=<new>"), run_lock(tmp_path):
            pass
    assert other() == "inside\n"


def test_the_links_of_wandbs_own_logs_do_not_keep_a_run_from_being_continued(tmp_path: Path):
    logs = tmp_path / "run" / "wandb" / "run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "core-debug.log")
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").is_file()


@pytest.mark.parametrize("link", [".lock", "diffusion", "diffusion/images", "config.yaml", "wandb"])
def test_a_run_with_a_link_that_leads_out_of_it_writes_nothing(tmp_path: Path, link: str):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "run" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / link).symlink_to(precious)
    with pytest.raises(ValueError, match=rf"{link} is a link"), run_lock(tmp_path / "run"):
        pytest.fail("the run began")
    assert precious.read_text() == "kept"


def test_stages_run_in_their_own_order():
    assert ORDER.chosen(["export", "diffusion"]) == ["diffusion", "export"]
    with pytest.raises(ValueError, match=r"unknown stages \['unet'\]; choose from .*autoencoder, latents, diffusion"):
        ORDER.chosen(["unet"])


def test_a_missing_upstream_stage_names_the_command(tmp_path: Path):
    with pytest.raises(Refused, match=r"run it first: stages=\[autoencoder,latents\]"):
        ORDER.result_of(tmp_path, "latents", "content")


def test_a_sweep_takes_a_finished_stage_from_a_sibling_only_under_an_equal_key_and_equal_steps(tmp_path):
    made = []

    def stage(lr: float, steps: int) -> Step:
        def run(folder):
            made.append(folder.parent.name)
            (folder / "weights").write_text(folder.parent.name)
            return {}

        return Step("autoencoder", lambda: {"lr": lr}, run, steps)

    assert stages.advance(stage(0.1, 5), tmp_path / "a", {}, writer=True, share=True) == "run"
    (tmp_path / "b").mkdir()
    assert stages.advance(stage(0.1, 5), tmp_path / "b", {}, writer=True, share=True) == "share"
    assert (tmp_path / "b" / "autoencoder" / "weights").read_text() == "a"
    assert stages.advance(stage(0.1, 5), tmp_path / "b", {}, writer=True, share=True) == "skip"
    assert stages.advance(stage(0.2, 5), tmp_path / "c", {}, writer=True, share=True) == "run"
    assert stages.advance(stage(0.1, 6), tmp_path / "d", {}, writer=True, share=True) == "run"
    assert stages.advance(stage(0.1, 5), tmp_path / "e", {}, writer=True) == "run"
    assert made == ["a", "c", "d", "e"]


def _job(folder: str, name: str, made: str) -> None:
    def run(stage_folder):
        with open(made, "a") as file:
            file.write(f"{name}\n")
        time.sleep(1.0)
        return {}

    stage = Step("autoencoder", lambda: {"lr": 0.1}, run, 5)
    (Path(folder) / name).mkdir(exist_ok=True)
    stages.advance(stage, Path(folder) / name, {}, writer=True, share=True)


def test_two_jobs_at_once_make_a_shared_stage_once(tmp_path):
    jobs = [multiprocessing.Process(target=_job, args=(str(tmp_path), n, str(tmp_path / "made"))) for n in "abc"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len((tmp_path / "made").read_text().split()) == 1
    assert all(read_note(tmp_path / n / "autoencoder")["finished"] for n in "abc")


def test_stages_follow_from_each_other_directly_or_not():
    assert ORDER.later_than("autoencoder") == ["latents", "diffusion", "evaluation", "export", "classifier"]
    assert ORDER.later_than("diffusion") == ["evaluation", "export"]
    assert ORDER.later_than("export") == ORDER.later_than("perceptual") == []


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_options_that_a_run_of_before_lacks_are_at_their_defaults(stage: str) -> None:
    """Options added in 2026-11, which older runs lack: in a section, in a part, and in a part within a part."""
    added = {
        "autoencoder": ["task.augmentation", "ema_width", "max_time", "loss.lecam_weight", "loss.r1_weight"],
        "diffusion": [
            "task.alignment",
            "ema_width",
            "max_time",
            "objective.input_perturbation",
            "objective.immiscible",
        ],
    }[stage]
    config = composed("train", "experiment=quickstart")
    new = OmegaConf.to_container(config[stage], resolve=True)
    old = copy.deepcopy(new)
    for option in added:
        *path, last = option.split(".")
        node = old
        for name in path:
            node = node[name]
        del node[last]
    assert differences({stage: old}, {stage: new}, option_defaults(config)) == []
    changed = copy.deepcopy(new)
    changed["max_time"] = "5min"
    assert differences({stage: old}, {stage: changed}, option_defaults(config)) == [f"{stage}.max_time: None -> 5min"]


def test_a_run_of_before_has_no_plan_and_no_price(tmp_path: Path) -> None:
    tree = OmegaConf.to_container(composed("train", "experiment=quickstart"))
    new = ("plan", "memory", "price_per_hour", "techniques")
    config = OmegaConf.create({name: value for name, value in tree.items() if name not in new})
    assert not Run(config, tmp_path, Machine("cpu", "32")).plans_only
