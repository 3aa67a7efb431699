"""Fine-tune a language model with QLoRA: config -> 4-bit model -> LoRA -> training -> adapter, curves, log.

    python train_qlora.py                              Qwen2.5-3B-Instruct on Wikitext-2, one 8 GB GPU
    python train_qlora.py --config configs/tiny.yaml   a 3.5 M parameter model on a laptop, about a minute
    python train_qlora.py --rank 8 --alpha 16 --num_epochs 1 --output_dir out_r8
    python train_qlora.py --plan                       what the run will take, and whether it fits, before anything is loaded
    python train_qlora.py --preview                    what it will train on: records with their trained tokens marked, and counts

Every key of config.yaml can be set: --set training.learning_rate=1e-4. inference_example.py talks to the result.
torch is imported only when the settings are known to be right, so that a mistake is answered at once.
"""

import argparse
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import cli
from qlora_kit.adapter.save import save_adapter
from qlora_kit.config import Config
from qlora_kit.config_file import load_config, override, parse_set
from qlora_kit.data.blocks import Blocks, RecordBlocks
from qlora_kit.data.dataset import load_blocks
from qlora_kit.data.source import check_source
from qlora_kit.errors import Stopped, UserError
from qlora_kit.model.fingerprint import weights_fingerprint
from qlora_kit.model.hub import (
    fetch_model,
    fetch_tokenizer,
    go_offline_if_unreachable,
    is_local,
    model_folder,
    remote_code_warning,
)
from qlora_kit.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from qlora_kit.output.checkpoints import Checkpoint
from qlora_kit.output.curves import plot_training_curves, read_metrics
from qlora_kit.output.folder import CURVES, check_disk, check_output_dir
from qlora_kit.output.lock import OutputLock
from qlora_kit.output.provenance import write_passport
from qlora_kit.planning.fit import check_fit
from qlora_kit.planning.plan import check_division, make_plan, plan_inputs, resume_plan
from qlora_kit.training.processes import ALONE, Team, check_alike, check_gpus, choose_own_gpu, connected, find_team, what_runs
from qlora_kit.training.report import RunReport, build_passport, open_output
from qlora_kit.training.resume import check_same_material, find_common_checkpoint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# Named flags and the keys that they set; every other key goes through --set.
FLAGS = {
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "dropout": "lora.dropout",
    "num_epochs": "training.num_epochs",
    "max_steps": "training.max_steps",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "max_length": "data.max_length",
    "model_name": "model.name",
    "dataset": "data.dataset",
    "output_dir": "training.output_dir",
    "seed": "training.seed",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).with_name("config.yaml"),
        metavar="FILE",
        help="settings (default: config.yaml)",
    )
    for flag, key in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"sets {key}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="sets any key; may be repeated")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in output_dir, or from this one, or the newest of this folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    parser.add_argument("--plan", action="store_true", help="show what the run will take and whether it fits, then stop")
    parser.add_argument("--processes", type=int, metavar="N", help="with --plan: of a run of N processes, a GPU each")
    parser.add_argument("--preview", action="store_true", help="show what will be trained on, then stop; loads no weights")
    return parser.parse_args(argv)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dotted keys from the command line; a named flag wins over --set."""
    named = {key: getattr(arguments, flag) for flag, key in FLAGS.items() if getattr(arguments, flag) is not None}
    return parse_set(arguments.set) | named


def prepare_dataset(
    config: Config, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Blocks | RecordBlocks, Blocks | RecordBlocks | None]:
    """Training and evaluation blocks of `data.max_length` tokens.

    Raises:
        UserError: the source cannot be read, a record of it is wrong, or it is too short for one block.
    """
    return load_blocks(config, tokenizer)


def main(argv: list[str] | None = None) -> None:
    team = find_team()
    choose_own_gpu(team.local_rank)
    with connected(team):
        arguments = parse_arguments(argv)
        config = load_config(arguments.config, overrides(arguments))
        if arguments.processes is not None and (arguments.processes < 1 or not arguments.plan):
            raise UserError(
                f"--processes: {arguments.processes}: says how many, 1 or more, --plan is for; torchrun or accelerate starts them"
            )
        if team.count > 1:  # one alone need not read all of the code to agree with itself
            flags = {"--plan": str(arguments.plan), "--preview": str(arguments.preview)}
            check_alike(team, flags | what_runs(config))
        check_division(config, arguments.processes or team.count)
        cli.prepare_libraries()
        if team.count > 1 and config.training.device != "cpu":
            check_gpus(team)
        if arguments.plan:
            from qlora_kit.training.machine import describe_plan

            return print(describe_plan(config, arguments.processes or team.count)) if team.leads else None
        check_source(config.data)
        if arguments.preview:
            return preview(config) if team.leads else None
        # The first process alone writes.
        folder = check_output_dir(config.training.output_dir, arguments.overwrite or not team.leads, arguments.resume is not None)
        with OutputLock(folder) if team.leads else nullcontext() as lock:
            train_adapter(arguments, config, folder, lock, team)


def train_adapter(
    arguments: argparse.Namespace, config: Config, folder: Path, lock: OutputLock | None, team: Team = ALONE
) -> None:
    """Plan, data, model, training, adapter: what README shows as a picture, top to bottom.

    Args:
        lock: of the folder, in the process that writes.
    """
    checkpoint, lines = find_common_checkpoint(folder, config, arguments.resume, team)
    if not (is_local(config.model.name) and all(map(is_local, config.data.names))):
        go_offline_if_unreachable()
    from qlora_kit.training.machine import read_fast_shape

    shape, reason = read_fast_shape(config)
    if shape and team.leads:
        check_disk(folder, shape.lora_parameters(config.lora.rank, config.lora.target_modules), config.training.optimizer_bytes)

    from qlora_kit.training.machine import look_at_machine, out_of_memory_is_one_line

    machine = look_at_machine(config, shape)
    check_alike(team, {"training.device": machine.device, "quantization.compute_dtype": machine.dtype_name})
    # What cannot be compiled here takes more memory.
    as_here = config if machine.compiles else override(config, {"performance.compile": False})
    written_out = None if reason else shape
    limit = min(team.gather(machine.limit)) if machine.limit is not None else None  # of the fullest GPU: all take the same plan
    plan = make_plan(as_here, written_out, limit, team.count)
    if checkpoint:
        settings_unchanged = checkpoint.run["asked"] == plan_inputs(config) and checkpoint.run["processes"] == team.count
        plan = resume_plan(plan, as_here, written_out, limit, checkpoint.run, settings_unchanged, team.count)
    check_fit(plan, as_here, shape, limit, team.count)
    report = RunReport(config, machine, plan, team)
    report.announce()
    for line in lines:
        report.log.line(line)
    # Data first: what is wrong with it is to be known before gigabytes of weights are fetched.
    with team.first_on_each_node():
        fetch_tokenizer(config.model)
        tokenizer = load_tokenizer(config.model)
        train, evaluation = prepare_dataset(config, tokenizer)
    report.describe_data(train, evaluation)
    recognise(
        report,
        checkpoint,
        {"train_sha256": report.data["train_sha256"], "tokenizer_sha256": tokenizer_fingerprint(tokenizer)},
    )
    from qlora_kit.training.build import build_trainer
    from qlora_kit.training.resume import check_end

    if checkpoint:
        check_end(checkpoint, config, len(train))
    with team.first_on_each_node():
        recognise(report, checkpoint, {"base_sha256": weights_fingerprint(fetch_model(config.model)) or ""})
    check_alike(team, report.material)
    with report.telling_how_it_ends(), out_of_memory_is_one_line(config, planned=bool(plan.parts)):
        model, tokenizer = load_adapted_model(config, report, tokenizer)

        from qlora_kit.model.perplexity import recorded_base

        trainer = build_trainer(model, train, evaluation, report)
        if lock:
            if lock.take():  # the folder is new, or another run made it meanwhile
                check_output_dir(config.training.output_dir, arguments.overwrite, checkpoint is not None)
            open_output(folder, report, checkpoint, arguments.overwrite)
        before = recorded_base(read_metrics(checkpoint.folder)) if checkpoint else trainer.measure_base()
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        if team.leads:
            plot_training_curves(read_metrics(folder), folder / CURVES)
        if number := team.highest(trainer.stopping.signal or 0):  # all together: one may have been asked after the last step
            raise Stopped(128 + number, how_to_resume(arguments, trainer.state.global_step, team))
        after = trainer.measure_final()
        if team.leads:
            save_adapter(model, tokenizer, folder)
    if team.leads:
        write_passport(folder, build_passport(report, tokenizer, before, after, **trainer.how_it_went()))
        report.summary(folder, before, after, trainer.state.global_step, trainer.kept_step)


def recognise(report: RunReport, checkpoint: Checkpoint | None, found: dict[str, str]) -> None:
    """Keep fingerprints for the checkpoints to come; a run that is resumed has to have been trained on the same.

    Raises:
        UserError: it was not.
    """
    report.material |= found
    if checkpoint:
        check_same_material(checkpoint, found)


def preview(config: Config) -> None:
    """Print what a run would train on; loads the tokenizer only."""
    from qlora_kit.data.preview import show_preview

    if not (is_local(config.model.name) and all(map(is_local, config.data.names))):
        go_offline_if_unreachable()
    if config.model.trust_remote_code:
        print(remote_code_warning(config.model), file=sys.stderr)
    fetch_tokenizer(config.model)
    tokenizer = load_tokenizer(config.model)
    show_preview(config, tokenizer, *prepare_dataset(config, tokenizer), cli.results_console())


def load_adapted_model(
    config: Config, report: RunReport, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> tuple["PeftModel", "PreTrainedTokenizerBase"]:
    """The base model in 4 bits with fresh LoRA matrices beside its projections."""
    from transformers import set_seed

    from qlora_kit.fast.sharding import load_sharded, sharded_base
    from qlora_kit.fast.training_pass import offload_embedding
    from qlora_kit.model.load import check_context, guard_cpu_kernels, quantization_config, set_padding
    from quantization_utils import create_lora_config, load_model_and_tokenizer, prepare_model_for_training

    lora, machine, performance = config.lora, report.machine, config.performance
    quantization = quantization_config(config.quantization, machine.dtype)
    if performance.fsdp:
        folder, in_host_memory = model_folder(config.model), performance.fsdp == "offload"
        assert folder and tokenizer
        model = load_sharded(
            folder, quantization, machine.device, machine.dtype, in_host_memory, not performance.offload_embedding
        )
        guard_cpu_kernels(model, config.model.name)
        set_padding(tokenizer, model)
    else:
        model, tokenizer = load_model_and_tokenizer(
            config.model.name,
            quantization,
            device=machine.device,
            dtype=machine.dtype,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            tokenizer=tokenizer,
        )
    check_context(model, config.data.max_length)
    moved = offload_embedding(model) if performance.offload_embedding else 0
    if parts := sharded_base(model):
        moved += parts.parameters
    report.memory("after loading")
    recompute = config.training.gradient_checkpointing
    set_seed(config.training.seed)  # decides where the LoRA matrices start
    adapted = prepare_model_for_training(
        model,
        create_lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules),
        use_gradient_checkpointing=machine.device == "cuda" if recompute == "auto" else bool(recompute),
    )
    trainable, total = adapted.get_nb_trainable_parameters()  # counts a packed byte as the two weights that it holds
    report.describe_model(trainable, total + moved)
    return adapted, tokenizer


def how_to_resume(arguments: argparse.Namespace, step: int, team: Team) -> str:
    dropped = ("--overwrite", "--resume", arguments.resume, f"--resume={arguments.resume}")
    again = [word for word in sys.argv[1:] if word not in dropped]
    launcher = ["python"] if team.count == 1 else ["torchrun", f"--nproc_per_node={team.local_count}"]
    return (
        f"Stopped after step {step}; everything is saved. Go on with: {shlex.join([*launcher, sys.argv[0], *again, '--resume'])}"
        + (", on each node" if team.local_count < team.count else "")
    )


if __name__ == "__main__":
    cli.run(main)
