"""Fine-tune a language model with QLoRA: config -> 4-bit model -> LoRA -> training -> adapter, curves, log.

    python train_qlora.py                              Qwen2.5-3B-Instruct on Wikitext-2, one 8 GB GPU
    python train_qlora.py --config configs/tiny.yaml   a 3.5 M parameter model on a laptop, about a minute
    python train_qlora.py --rank 8 --alpha 16 --num_epochs 1 --output_dir out_r8
    python train_qlora.py --plan                       memory of the run part by part, and whether it fits; loads nothing
    python train_qlora.py --preview                    the training data, with the trained tokens marked, and counts

Every key of config.yaml can be set: --set training.learning_rate=1e-4. inference_example.py talks to the result.
From Python: train(config). torch is imported only after the settings are checked, so that a mistake is answered at once.
"""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import cli
from qlora_kit.config import Config
from qlora_kit.config_file import load_config, override, parse_set
from qlora_kit.data.blocks import TrainingBlocks
from qlora_kit.data.dataset import load_blocks
from qlora_kit.data.preview import show_preview
from qlora_kit.data.source import check_source, estimate_tokens, list_local_inputs
from qlora_kit.errors import Stopped, UserError
from qlora_kit.model import hub
from qlora_kit.model.architecture import read_fast_shape
from qlora_kit.model.fingerprint import weights_fingerprint
from qlora_kit.model.packed_base import settle_quantization
from qlora_kit.model.tokenizer import load_tokenizer, read_chat_template, template_fingerprint, tokenizer_fingerprint
from qlora_kit.output.curves import plot_training_curves, scheduled_rates
from qlora_kit.output.folder import CURVES, check_disk
from qlora_kit.output.lock import OutputLock
from qlora_kit.output.metrics import read_metrics
from qlora_kit.output.place import check_output_dir
from qlora_kit.planning.cards import find_card
from qlora_kit.planning.fit import describe_plan
from qlora_kit.planning.memory import CONTEXT_BYTES
from qlora_kit.planning.plan import check_division
from qlora_kit.planning.shape import KNOWN_CONFIGS
from qlora_kit.shipped import describe_shipped, locate_config
from qlora_kit.training.processes import (
    ALONE,
    Team,
    check_gpus,
    check_identical,
    choose_own_gpu,
    connect,
    read_team,
    run_identity,
)
from qlora_kit.training.report import Run, RunReport, RunResult, open_output
from qlora_kit.training.resume import check_end, check_fingerprints, command_again, find_start
from qlora_kit.untrusted import user_path
from qlora_kit.wrapping import say

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.output.checkpoints import Checkpoint
    from qlora_kit.training.build import TrainingData
    from qlora_kit.training.machine import Machine

# Named flags: the key that each sets, its value, and what it means; every other key goes through --set.
FLAGS = {
    "rank": ("lora.rank", "N", "columns of A and B, the size of the update; from 1"),
    "alpha": ("lora.alpha", "A", "the update is scaled by alpha / rank; above 0"),
    "dropout": ("lora.dropout", "P", "share of the update's inputs that is dropped in training; from 0 to below 1"),
    "num_epochs": ("training.num_epochs", "N", "passes over the data; above 0, also 0.5"),
    "max_steps": ("training.max_steps", "N", "optimizer steps, instead of epochs; from 1"),
    "batch_size": ("training.batch_size", "B", "sequences, times gradient_accumulation_steps, per optimizer step; from 1"),
    "learning_rate": ("training.learning_rate", "LR", "peak of the learning rate; above 0"),
    "max_length": ("data.max_length", "L", "tokens per block; from 8"),
    "model_name": ("model.name", "M", "base model: a Hub name or a folder"),
    "dataset": ("data.dataset", "D", "what to train on: a Hub name, a file or a folder"),
    "output_dir": ("training.output_dir", "DIR", "folder for adapter, curves, log and checkpoints"),
    "seed": ("training.seed", "S", "decides the first A, the order of the data and dropout; from 0 to 2**32 - 1"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.OneLineParser(__doc__)
    default = Path("config.yaml")
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help="settings (default: config.yaml)")
    defaults = Config().model_dump()
    for flag, (key, value, meaning) in FLAGS.items():
        section, name = key.split(".")
        usual = defaults[section][name]
        parser.add_argument(f"--{flag}", metavar=value, help=f"{meaning} ({key}, default {'none' if usual is None else usual})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="sets any key of config.yaml; may be repeated"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="continue from the newest checkpoint in output_dir; or from this one, or the newest of this folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    parser.add_argument("--plan", action="store_true", help="show the memory of the run and whether it fits, then stop")
    parser.add_argument("--processes", type=int, metavar="N", help="with --plan: of a run of N processes, a GPU each; from 1")
    parser.add_argument("--gpu", metavar="NAME", help='with --plan: for this card instead of the machine\'s, such as "RTX 4060"')
    parser.add_argument("--preview", action="store_true", help="show the training data, then stop; loads no weights")
    return parser.parse_args(argv)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the dotted keys of the command line; a named flag wins over --set."""
    named = {key: getattr(arguments, flag) for flag, (key, *_) in FLAGS.items() if getattr(arguments, flag) is not None}
    return parse_set(arguments.set) | named


def main(argv: list[str] | None = None) -> None:
    team = read_team()
    choose_own_gpu(team.local_rank)
    with connect(team):
        arguments = parse_arguments(argv)
        path = locate_config(arguments.config)
        config = load_config(path, overrides(arguments))
        if team.is_main and (shipped := describe_shipped([path, config.model.name, *config.data.names, config.data.eval_split])):
            say(shipped)
        if arguments.processes is not None and (arguments.processes < 1 or not arguments.plan):
            raise UserError("--processes", arguments.processes, "is for --plan, and 1 or more", "start processes with torchrun")
        if arguments.gpu is not None and not arguments.plan:
            raise UserError("--gpu", arguments.gpu, "is for --plan", "leave it out: a run takes the GPU of this machine")
        if team.count > 1:
            flags = {"--plan": str(arguments.plan), "--preview": str(arguments.preview)}
            check_identical(team, flags | run_identity(config))
        cli.prepare_libraries()
        if arguments.plan or arguments.preview:
            processes = arguments.processes or team.count
            if not team.is_main:
                return None
            return show_plan(config, processes, arguments.gpu) if arguments.plan else preview(config, processes)
        try:
            train(config, arguments.resume, arguments.overwrite, team)
        except Stopped as stopped:
            way, flag = ("Continue", "--resume") if stopped.can_resume else ("Start again", "--overwrite")
            again = command_again(sys.argv, arguments.resume, team, flag)
            raise Stopped(stopped.status, f"{stopped} {way} with: {again}") from None


def show_plan(config: Config, processes: int, gpu: str | None = None) -> None:
    """Print the plan for a card: the named one, else this machine's GPU, whose speed is measured in two seconds.

    Args:
        gpu: a card of planning/cards.py; torch is imported only without one.

    Raises:
        UserError: there is no prediction for this architecture, or for the library's layers.
    """
    check_division(config, processes)
    if config.model.name not in KNOWN_CONFIGS:  # whose shape needs no Hub
        hub.prepare(config.model.name)
    config, _ = settle_quantization(config)
    shape, reason = read_fast_shape(config)
    if shape is None or reason:
        remedy = "train with a small --max_steps and read the log"
        raise UserError("--plan", config.model.name, f"has no prediction ({reason})", remedy)
    card = None
    if gpu is not None:
        card = find_card(gpu)
        card = replace(card, memory=card.memory - CONTEXT_BYTES)
    elif any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):  # of Linux and of WSL; torch takes seconds
        from qlora_kit.model.device import free_gpu_memory
        from qlora_kit.model.gpu_speed import measure_gpu

        if free := free_gpu_memory():
            card = replace(measure_gpu(), memory=free[1])
    try:
        tokens = estimate_tokens(config.data)
    except UserError:  # a plan needs no data
        tokens = None
    say(describe_plan(config, shape, card, processes, tokens), sys.stdout)


def preview(config: Config, processes: int) -> None:
    """Print what a run would train on; loads the tokenizer only."""
    check_division(config, processes)
    check_source(config.data)
    read_chat_template(config.data.chat_template)  # a mistake in it is answered before anything is loaded
    hub.prepare(config.model.name, *config.data.names)
    if config.model.trust_remote_code:
        say(hub.remote_code_warning(config.model))
    hub.fetch_tokenizer(config.model)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    show_preview(config, tokenizer, *prepare_dataset(config, tokenizer), cli.results_console())


def train(
    config: Config | Path | str | dict[str, Any], resume: Path | str | None = None, overwrite: bool = False, team: Team = ALONE
) -> RunResult:
    """Train an adapter, and write it with its curves and its log into `training.output_dir`.

    Args:
        config: the settings, a YAML file of them, or dotted keys that differ from the defaults: {"lora.rank": 8}.
        resume: a checkpoint, or a folder with checkpoints; empty for the newest checkpoint in output_dir; None to start.
        overwrite: replace the run in output_dir.
        team: the processes of the run; a single one by default.

    Raises:
        UserError: settings, data, model or machine do not allow the run.
        Failed: the run ended early: GPU memory or the disk is full, or a loss is NaN.
        Stopped: Ctrl+C, SIGTERM or a closed terminal: everything is saved; the second one: what came after a checkpoint is lost.
    """
    if isinstance(config, dict):
        config = override(Config(), config)
    elif not isinstance(config, Config):
        config = load_config(Path(config))
    check_division(config, team.count)
    if team.count > 1 and config.training.device != "cpu":
        check_gpus(team)
    check_source(config.data)
    read_chat_template(config.data.chat_template)  # a mistake in it is answered before anything is loaded
    folder = user_path(config.training.output_dir, "training.output_dir")
    if team.is_main:  # only rank 0 writes
        check_output_dir(config.training.output_dir, overwrite, resume is not None, list_local_inputs(config))
    with OutputLock(folder) if team.is_main else nullcontext() as lock:
        return _train(config, None if resume is None else str(resume), overwrite, team, folder, lock)


def _train(config: Config, resume: str | None, overwrite: bool, team: Team, folder: Path, lock: OutputLock | None) -> RunResult:
    """Plan, data, model, training, adapter: the picture in docs/how_it_works.md, top to bottom.

    Args:
        lock: of the folder, in the process that writes.
    """
    place, checkpoint, notes = find_start(folder, config, resume, overwrite, team)
    hub.prepare(config.model.name, *config.data.names)
    config, packed = settle_quantization(config)
    shape, reason = read_fast_shape(config)
    if shape and team.is_main:
        parameters = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
        check_disk(folder, parameters, config.training.optimizer_bytes)

    with cli.busy("Loading the libraries"):  # which takes seconds: everything above is answered before
        from qlora_kit.inference.samples import build_sampler
        from qlora_kit.training.build import build_store, build_trainer, find_why_not_packed
        from qlora_kit.training.checkpointing import read_base
        from qlora_kit.training.finish import save_result
        from qlora_kit.training.machine import explaining_out_of_memory, plan_run
        from qlora_kit.training.samples import SampleCallback
        from qlora_kit.training.stop import explaining_interrupt

        machine, plan = plan_run(config, shape, reason, checkpoint, team)
    run = Run(config, machine, plan, team)
    report = RunReport(run)
    report.announce(notes + packed)

    # Data before the model: a mistake in them is found before gigabytes of weights are downloaded.
    tokenizer, data, not_packed = load_data(config, checkpoint, report, team, fast=reason is None)
    sample = build_sampler(config, tokenizer, data.train.prompt_style, data.evaluation is not None)
    run.take_data_fingerprints()
    check_fingerprints(checkpoint, run.fingerprints)
    check_end(checkpoint, config, len(data.train))
    with team.local_main_first():
        run.fingerprints["base_sha256"] = weights_fingerprint(hub.fetch_model(config.model)) or ""
    check_fingerprints(checkpoint, run.fingerprints)
    check_identical(team, run.fingerprints)

    interrupted = explaining_interrupt(place)
    with report.logging_failure(), explaining_out_of_memory(config, planned=bool(plan.parts)), interrupted:
        with cli.busy("Loading the base model"):
            model = load_adapted_model(config, machine, tokenizer, report)
        if checkpoint is None and (not_packed := find_why_not_packed(model, data, config, machine, team)):
            data = data.unpack()  # of the same tokens; the plan is one of blocks, whatever they hold
            report.describe_data(*data, not_packed)
            run.take_data_fingerprints()
        store = build_store(config, plan, team, run.fingerprints, data.train.prompt_style, report, place, not_packed)
        trainer = build_trainer(model, data, config, machine, plan, report, store)
        if sample and team.is_main:
            trainer.add_callback(samples := SampleCallback(sample, model, config.training.sample_prompts or [], report.log))
            if checkpoint is None:
                samples.answer(0)
        if lock:
            if lock.take():  # the folder did not exist before, or another run made it meanwhile
                check_output_dir(config.training.output_dir, overwrite, checkpoint is not None)
            open_output(place, report, checkpoint)
        base = read_base(checkpoint) if checkpoint else trainer.measure_base()
        trainer.train(checkpoint)
        if number := team.max(trainer.stopping.signal or 0):  # on all ranks: one may have got it after the last step
            if team.is_main:
                draw_curves(report, place)
            team.gather(None)  # a process that ends before the others is reported as failed
            raise Stopped(128 + number, f"Stopped after step {trainer.state.global_step}; everything is saved.")
        result = RunResult(folder, trainer.kept_step, trainer.state.global_step, base, trainer.measure_final())
        if team.is_main:
            save_result(model, tokenizer, report, result, trainer.ending(), folder)
    if team.is_main:  # nothing below can cost the adapter
        report.log.settle(folder)
        draw_curves(report, folder)
        report.summary(folder, result)
    return result


def load_data(
    config: Config, checkpoint: "Checkpoint | None", report: RunReport, team: Team, fast: bool
) -> tuple["PreTrainedTokenizerBase", "TrainingData", str | None]:
    """Return the tokenizer, the blocks to train and evaluate on, and why they are not packed, which a resumed run keeps.

    Args:
        fast: whether the base model takes the fast path.

    Raises:
        UserError: tokenizer, data or base model do not fit together, or are not those of the run to resume.
    """
    from qlora_kit.training.base_check import check_base
    from qlora_kit.training.build import TrainingData

    run = report.run
    with team.local_main_first():
        hub.fetch_tokenizer(config.model)
        tokenizer = load_tokenizer(config.model, config.data.chat_template)
        run.fingerprints["tokenizer_sha256"] = tokenizer_fingerprint(tokenizer)
        run.fingerprints["template_sha256"] = template_fingerprint(tokenizer) or ""
        check_fingerprints(checkpoint, run.fingerprints)
        report.note(check_base(config, lora_config(config), tokenizer, fast))
        data = TrainingData(*prepare_dataset(config, tokenizer))
    not_packed = checkpoint.run.get("not_packed") if checkpoint else None
    data = data.unpack() if not_packed else data
    report.describe_data(*data, not_packed)
    return tokenizer, data, not_packed


def draw_curves(report: RunReport, folder: Path) -> None:
    with report.noting_failure(folder / CURVES):
        rates = scheduled_rates(report.run.config.training, report.steps)
        plot_training_curves(read_metrics(folder), folder / CURVES, report.title(), rates)


def prepare_dataset(config: Config, tokenizer: "PreTrainedTokenizerBase") -> tuple[TrainingBlocks, TrainingBlocks | None]:
    """Return training and evaluation blocks of `data.max_length` tokens.

    Raises:
        UserError: the source cannot be read, a record of it is wrong, or it is too short for one block.
    """
    return load_blocks(config, tokenizer)


def load_adapted_model(
    config: Config, machine: "Machine", tokenizer: "PreTrainedTokenizerBase", report: RunReport
) -> "PeftModel":
    """Load the base model in 4 bits, and add fresh LoRA matrices to its projections."""
    from transformers import set_seed

    from qlora_kit.adapter.targets import measure_reach
    from qlora_kit.fast.training_pass import offload_embedding
    from qlora_kit.model.load import check_context, describe_unused, quantization_config
    from qlora_kit.model.projections import count_packed
    from qlora_kit.model.trial import try_layers
    from qlora_kit.training.build import load_sharded_base, why_not_on_fast_path
    from quantization_utils import load_model_and_tokenizer, prepare_model_for_training

    base = config.model
    if config.performance.fsdp:
        model, outside = load_sharded_base(config, machine, tokenizer)
    else:
        model, _ = load_model_and_tokenizer(
            base.name,
            quantization_config(config.quantization, machine.dtype),
            device=machine.device,
            dtype=machine.dtype,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            tokenizer=tokenizer,
        )
        outside = 0
    check_context(model, config.data.max_length)
    if config.performance.offload_embedding:
        outside += offload_embedding(model)
    report.memory("after loading")
    packing = count_packed(model)
    report.note(describe_unused(model, base.name))
    recompute = config.training.gradient_checkpointing
    set_seed(config.training.seed)  # decides the initial LoRA matrices
    adapted = prepare_model_for_training(
        model,
        lora_config(config),
        use_gradient_checkpointing=machine.device == "cuda" if recompute == "auto" else bool(recompute),
    )
    trainable, total = adapted.get_nb_trainable_parameters()  # counts a packed byte as the two weights that it holds
    report.describe_model(trainable, total + outside, packing, measure_reach(adapted))
    if why_not_on_fast_path(adapted, config):
        try_layers(adapted, base.name, machine.device, machine.dtype)
    return adapted


def lora_config(config: Config) -> "LoraConfig":
    from quantization_utils import create_lora_config

    lora = config.lora
    return create_lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules)


if __name__ == "__main__":
    cli.run(main)
