"""ldm-search: hyperparameter search with Optuna over train.py; each trial is a separate process and a separate run."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ldm_train import interrupts
from ldm_train.configuration import config_folder, flatten, plain
from ldm_train.errors import first_line
from ldm_train.evaluation.evaluator import is_higher_better
from ldm_train.pipeline.sweep import read_rows
from ldm_train.rules import check as check_values
from ldm_train.rules import whole
from ldm_train.storage import write_json

POLL = 2.0  # seconds between looks at a trial's metrics.csv


def _suggestion(option: str, text: str) -> Callable[[Any], Any]:
    """Returns a function trial -> value. Raises ValueError if the text is not a range."""
    if match := re.fullmatch(r"\s*(log|int)?\s*\(([^,]+),([^,]+)\)\s*", text):
        kind, low, high = match[1], float(match[2]), float(match[3])
        if not low < high or (kind == "log" and low <= 0):
            raise ValueError
        if kind == "int":
            return methodcaller("suggest_int", option, int(low), int(high))
        return methodcaller("suggest_float", option, low, high, log=kind == "log")
    values = [v.strip() for v in text.strip("[]").split(",")]
    if len(values) < 2 or not all(values):
        raise ValueError
    return methodcaller("suggest_categorical", option, tuple(values))


def parse_space(space: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """{option: "a,b" | "(low,high)" | "log(low,high)" | "int(low,high)"} -> {option: trial -> value}. Raises ValueError
    if a text is not a range, or there is none."""
    parsed: dict[str, Callable[[Any], Any]] = {}
    if not isinstance(space, dict):
        raise ValueError(f'space={space} is no section: space={{diffusion.lr: "log(1e-4,1e-2)"}}')
    for option, text in flatten(space).items():
        try:
            parsed[option] = _suggestion(option, str(text))
        except ValueError:
            raise ValueError(
                f'space.{option}="{text}" is not a range; write "a,b,c", "(low,high)", "log(low,high)" or "int(low,high)"'
            ) from None
    if not parsed:
        raise ValueError('set the options to search: space={diffusion.lr: "log(1e-4,1e-2)"}')
    return parsed


def column(folder: Path, where: str) -> list[tuple[int, float]]:
    """Returns (step, value) for each row of `stage:column` in a run's metrics.csv written so far."""
    stage, _, name = where.partition(":")
    return [(int(row["step"]), float(row[name])) for row in read_rows(folder / stage) if row.get(name)]


def outcome(folder: Path, objective: str, minimize: bool) -> float:
    """The objective of a finished run. Raises ValueError, naming the available values, if it is missing."""
    if ":" in objective:
        values = [v for _, v in column(folder, objective)]
        if not values:
            raise ValueError(f"objective={objective} is in no row of {folder}; see its metrics.csv for the columns")
        return min(values) if minimize else max(values)
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        raise ValueError(
            f"objective={objective} is a value of {path}, which is not there; leave evaluation in stages, or choose a column: "
            "objective=diffusion:val/loss"
        )
    flat = flatten(json.loads(path.read_text()))
    value = flat.get(objective, flat.get(f"{objective}.value"))
    if not isinstance(value, int | float):
        known = [k.removesuffix(".value") for k, v in flat.items() if isinstance(v, int | float)]
        raise ValueError(f"objective={objective} is not in {folder}'s metrics.json; there are {', '.join(known[:20])}")
    return float(value)


def run_trial(trial: Any, config: DictConfig, space: dict[str, Callable[[Any], Any]], folder: Path) -> float:
    """Runs one training and returns its objective. Raises optuna.TrialPruned if it was stopped early, RuntimeError with
    its final message if it failed."""
    import optuna

    values = {option: suggest(trial) for option, suggest in space.items()}
    run = folder / f"{trial.number:03d}"
    command = [
        sys.executable, "-m", "ldm_train.cli.train", f"experiment={config.recipe}", f"runs_dir={folder.parent}",
        f"name={folder.name}/{run.name}", "share=true", "progress=false", f"logger={config.trial_logger}",
        *config.overrides, *(f"{o}={v}" for o, v in values.items()),
    ]  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    # The pruner takes the objective's direction for the reported column too.
    alike = config.prune is None or is_higher_better(config.prune) == (config.direction == "maximize")
    # A signal stops the running trial first.
    with open(run / "output.txt", "w") as output, interrupts.answered_by(interrupts.stop):
        own = os.environ | {interrupts.PARENT: str(os.getpid())}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=own)
        reported = 0
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if config.prune is None:
                    continue
                for step, value in column(run, config.prune)[reported:]:
                    trial.report(value if alike else -value, step)
                    reported += 1
                if trial.should_prune():
                    raise optuna.TrialPruned
        finally:
            if process.poll() is None:
                process.terminate()  # it saves a checkpoint, then exits
                process.wait()
    if process.returncode:
        words = (run / "output.txt").read_text().strip().splitlines() or ["no output"]
        raise RuntimeError(next((w for w in reversed(words) if w.startswith("error:")), words[-1]))
    if config.prune is not None and not column(run, config.prune):
        raise ValueError(f"prune={config.prune} is in no row of {run}; see its metrics.csv for the columns")
    return outcome(run, config.objective, config.direction == "minimize")


def check(config: DictConfig, algorithms: Sequence[str]) -> None:
    """Raises ValueError, naming the option, for invalid option values."""
    if config.direction not in ("minimize", "maximize"):
        raise ValueError(f"direction is minimize or maximize, not {config.direction!r}")
    if config.algorithm not in algorithms:
        raise ValueError(f"algorithm is {' or '.join(algorithms)}, not {config.algorithm!r}")
    check_values(config, {"trials": whole(1), "warmup_trials": whole(0), "seed": whole(0)}, ("trials",))
    if config.prune is not None and ":" not in config.prune:
        raise ValueError(f"prune={config.prune}: write stage:column, for example diffusion:val/loss")


def check_trial(config: DictConfig, space: dict[str, Callable[[Any], Any]]) -> None:
    """Raises ValueError if the recipe, the overrides or an option of the space is not known, which all trials would
    fail on."""
    import optuna

    trial, before = optuna.create_study().ask(), GlobalHydra.instance().hydra
    options = [
        f"experiment={config.recipe}",
        *config.overrides,
        *(f"{o}={suggest(trial)}" for o, suggest in space.items()),
    ]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            compose("train", options)
    except HydraException as error:
        raise ValueError(f"no trial could begin: {first_line(error)} (recipe={config.recipe})") from error
    finally:
        GlobalHydra.instance().hydra = before


def open_study(config: DictConfig, sampler: Callable[..., Any], folder: Path) -> Any:
    """Creates or continues the study in the folder's search.db. Raises ValueError if the folder holds another
    search."""
    import optuna

    warmup, pruners = config.warmup_trials, optuna.pruners
    pruner = pruners.MedianPruner(n_startup_trials=warmup) if config.prune else pruners.NopPruner()
    storage, name = f"sqlite:///{folder / 'search.db'}", "search"
    study = optuna.create_study(
        storage=storage, study_name=name, load_if_exists=True, direction=config.direction, pruner=pruner
    )
    # The seed depends on the trials so far, so that a continued search draws new values.
    study.sampler = sampler(seed=config.seed + len(study.trials), n_startup_trials=warmup)
    asked = {"space": flatten(OmegaConf.to_container(config.space)), "objective": config.objective}
    asked |= {"recipe": config.recipe, "overrides": list(config.overrides)}
    other = study.user_attrs.get("asked")
    if other is not None and other != asked:
        raise ValueError(f"{folder} holds another search ({other}); choose name=<new>")
    if (direction := study.direction.name.lower()) != config.direction:
        raise ValueError(f"{folder} holds a search with direction={direction}; choose name=<new>")
    study.set_user_attr("asked", asked)
    return study


def search(config: DictConfig) -> dict[str, Any]:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError("ldm-search needs `pip install 'ldm-train[sweep]'`") from error
    algorithms = {"gp": optuna.samplers.GPSampler, "tpe": optuna.samplers.TPESampler}
    check(config, list(algorithms))
    space = parse_space({} if config.space is None else plain(config).get("space"))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_trial(config, space)
    folder = Path(config.runs_dir).absolute() / (config.name or f"search_{config.recipe}")
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(config, algorithms[config.algorithm], folder)
    # Counts failed trials, which record a message ("why"), but not interrupted ones.
    trials, states = study.get_trials(deepcopy=False), optuna.trial.TrialState
    ended = sum(t.state in (states.COMPLETE, states.PRUNED) or "why" in t.user_attrs for t in trials)
    print(f"search {folder}: {ended} of {max(ended, config.trials)} trials done", flush=True)

    def said(study: Any, trial: Any) -> None:
        state = trial.state.name.lower()
        value = f"{trial.value:.5g}" if trial.value is not None else state
        print(f"trial {trial.number:03d}: {config.objective} {value}   {trial.params}", flush=True)
        if state == "fail":
            print(f"  {trial.user_attrs.get('why', '')}", flush=True)

    def objective(trial: Any) -> float:
        try:
            return run_trial(trial, config, space, folder)
        except RuntimeError as error:
            trial.set_user_attr("why", str(error))
            raise

    study.optimize(objective, n_trials=max(0, config.trials - ended), callbacks=[said], catch=(RuntimeError,))
    if not study.get_trials(deepcopy=False, states=[states.COMPLETE]):
        raise ValueError(f"no trial of {folder} came to its end; see the output.txt of each")
    best = {"trial": study.best_trial.number, "value": study.best_value, "params": study.best_params}
    write_json(folder / "best.json", best)
    print(f"best: trial {best['trial']:03d}, {config.objective} {best['value']:.5g}")
    print("  " + " ".join(f"{k}={v}" for k, v in best["params"].items()))
    return best
