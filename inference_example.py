"""Talk to a trained adapter.

    python inference_example.py --mode interactive                     a prompt, streamed answers
    python inference_example.py --mode demo                            prompts that fit the adapter, answered with it and without
    python inference_example.py --mode text --prompt "The river"       only the generated text, for scripts
    python inference_example.py --perplexity FILE                      perplexity with the adapter and without

Base model, quantization, prompt style and stop tokens come from the adapter's folder. An adapter of running text continues its
prompt, one of chats or instructions answers it. Several answers of --mode text have a line between them that holds nothing but a
form feed; --json puts each on a line of its own. What is said about answers goes to standard error.
"""

import argparse
import io
import sys
from typing import TYPE_CHECKING, Any, TextIO

from qlora_kit import cli
from qlora_kit.adapter.folder import AdapterSource, check_base, fetch_base, load_checked_tokenizer, read_adapter
from qlora_kit.adapter.lora_pairs import read_pairs
from qlora_kit.config import Config, GenerationSettings
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.data.source import source_files
from qlora_kit.errors import UserError
from qlora_kit.inference.generator import Generator, PromptEncoder, replace_settings
from qlora_kit.inference.modes import encode_prompts, run_demo, run_text
from qlora_kit.inference.prompts import Prompt, demo_prompts, read_prompt, read_prompt_file
from qlora_kit.model.hub import fetch_model, fetch_tokenizer, go_offline_if_unreachable, is_local, model_folder, read_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 8  # prompts answered at once
SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--mode",
        choices=["interactive", "demo", "text"],
        help="default: interactive; text where a prompt is given; none where --perplexity is all that is asked",
    )
    parser.add_argument(
        "--adapter",
        type=cli.nonempty,
        default="./output_qlora_qwen_3b",
        metavar="DIR",
        help="folder that train_qlora.py wrote, a checkpoint of it, or any PEFT adapter (default: %(default)s)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="for --mode text; - takes all of standard input for one prompt")
    parser.add_argument("--prompt_file", metavar="FILE", help="for --mode text: one prompt a line; - reads standard input")
    parser.add_argument("--batch_size", metavar="B", help="prompts of --prompt_file that are answered at once (default: 8)")
    parser.add_argument("--json", action="store_true", help="one object a line: prompt, text, tokens, stop, seconds, seed")
    parser.add_argument("--system", metavar="TEXT", help="system message, for an adapter of chats")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    parser.add_argument("--base_only", action="store_true", help="leave the adapter out, to see what it changes")
    parser.add_argument("--compare", action="store_true", help="answer with and without the adapter; --mode demo does so anyway")
    parser.add_argument(
        "--merged", action="store_true", help="fold the adapter into 16-bit weights first, where there is room: faster"
    )
    parser.add_argument(
        "--perplexity", type=cli.nonempty, metavar="DATA", help="file or data set: perplexity with and without the adapter on it"
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: the GPU where there is one")
    parser.add_argument(
        "--device_map",
        choices=["auto", "one"],
        default="auto",
        help="auto: over several GPUs where the first cannot hold the base model; one: onto the first in any case",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="S", help="the same prompt and seed give the same text (default: %(default)s)"
    )
    parser.add_argument("--max_new_tokens", metavar="N", help="length of the answer at most")
    parser.add_argument("--temperature", metavar="T", help="0 always takes the likeliest token; higher is more varied")
    parser.add_argument("--top_p", metavar="P", help="sample from the likeliest tokens that make up this probability")
    parser.add_argument("--top_k", metavar="K", help="sample from this many likeliest tokens; 0 from all")
    parser.add_argument("--repetition_penalty", metavar="R", help="above 1 makes tokens that occurred already less likely")
    arguments = parser.parse_args(argv)
    if arguments.mode is None and (arguments.prompt is not None or arguments.prompt_file is not None):
        arguments.mode = "text"
    elif arguments.mode is None and arguments.perplexity is None:
        arguments.mode = "interactive"
    return arguments


def check_streams(arguments: argparse.Namespace) -> None:
    """Make prompts from a pipe and answers into one UTF-8, whatever the locale; a terminal has its own encoding.

    Raises:
        UserError: one that is needed was closed before the program began.
    """
    if sys.stdout is None:
        raise UserError("standard output: closed; send it to a file, or to /dev/null")
    if sys.stdin is None and (arguments.mode == "interactive" or "-" in (arguments.prompt, arguments.prompt_file)):
        raise UserError("standard input: closed; open it, or give the prompt itself: --prompt TEXT")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and stream.isatty():
            stream.reconfigure(errors="replace")
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")


def check_flags(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UserError: flags that cannot stand together, or a value that cannot be.
    """
    prompts = [flag for flag in ("prompt", "prompt_file") if getattr(arguments, flag) is not None]
    if len(prompts) == 2:
        raise UserError("--prompt: cannot stand beside --prompt_file; give one of them")
    if prompts and arguments.mode != "text":
        raise UserError(f"--{prompts[0]}: is for --mode text, and the mode is {arguments.mode}; change one of them")
    if arguments.mode == "text" and not prompts:
        raise UserError('--prompt: --mode text needs one, such as --prompt "The river"; - reads it from standard input')
    if arguments.compare and arguments.base_only:
        raise UserError("--compare: cannot stand beside --base_only, which leaves the adapter out; give one of them")
    if arguments.merged:
        check_merged(arguments)
    if arguments.mode == "interactive" and arguments.json:
        raise UserError("--json: is for --mode text or demo; change the mode")
    if arguments.compare and arguments.mode is None:
        raise UserError("--compare: needs prompts; add a --mode, for text with some (--perplexity compares anyway)")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed: {arguments.seed}: should be a whole number from 0 up to 2**32; the default is 42")
    if arguments.perplexity is not None and is_local(arguments.perplexity):
        source_files(arguments.perplexity, "--perplexity")
    if arguments.batch_size is not None and not (arguments.batch_size.isdecimal() and int(arguments.batch_size)):
        raise UserError(
            f"--batch_size: {arguments.batch_size}: should be a whole number of at least 1; the default is {BATCH_SIZE}"
        )


def check_merged(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UserError: something else needs the base model or the adapter alone, which folding leaves neither of.
    """
    for flag in ("base_only", "compare", "perplexity"):
        if getattr(arguments, flag):
            raise UserError(
                f"--merged: leaves no base model to answer alone, as --{flag} wants it to; give one of them "
                "(python -m qlora_kit.merge compares perplexities)"
            )
    if arguments.mode == "demo":
        raise UserError("--merged: leaves no base model to answer beside the adapter, as --mode demo does; use --mode text")


def check_style(arguments: argparse.Namespace, source: AdapterSource) -> None:
    """
    Raises:
        UserError: a system message for an adapter that never saw one.
    """
    if arguments.system is not None and source.style != "chat":
        trained = {"text": "running text", "instruction": "instructions"}[source.style]
        raise UserError(f"--system: {source.folder} was trained on {trained}, which has no system message; leave it out")


def sampling_settings(arguments: argparse.Namespace, config: Config) -> GenerationSettings:
    """The adapter's own settings with the flags laid over them.

    Raises:
        UserError: values that cannot be: one problem for each.
    """
    given = {flag: getattr(arguments, flag) for flag in SAMPLING_FLAGS if getattr(arguments, flag) is not None}
    return replace_settings(config.generation, given, "--", "the adapter's own is")


def read_prompts(arguments: argparse.Namespace, style: str) -> list[Prompt]:
    """What is to be answered: the prompts given, or those of the demo; none yet in interactive mode."""
    if arguments.prompt is not None:
        return [read_prompt(arguments.prompt)]
    if arguments.prompt_file is not None:
        return read_prompt_file(arguments.prompt_file)
    return demo_prompts(style) if arguments.mode == "demo" else []


def load_generator(
    source: AdapterSource,
    settings: GenerationSettings,
    arguments: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Generator:
    """
    Args:
        tokenizer: that of `source`, where it is loaded already.
    """
    from qlora_kit.adapter.attach import attach_adapter, check_vocabulary, does_nothing
    from qlora_kit.inference.library_engine import choose_engine
    from qlora_kit.model.device import choose_device, usable_dtype
    from qlora_kit.model.gpu_placement import choose_device_map
    from quantization_utils import create_bnb_config, load_model_and_tokenizer

    device = choose_device(arguments.device, "--device")
    dtype, note = usable_dtype(source.quantization.compute_dtype, device, insisted=False)
    if note:
        print(note, file=sys.stderr)
    check_base(source)
    if arguments.merged:
        from qlora_kit.adapter.fold import check_memory, fold

        check_memory(source.model, dtype, device)
    packing, folder, device_map, note = source.quantization, model_folder(source.model), None, None
    if folder:  # else loading will say why
        device_map, note = choose_device_map(folder, source.model, packing, dtype, device, arguments.device_map)
    if note:
        print(note, file=sys.stderr)
    model, tokenizer = load_model_and_tokenizer(
        source.model.name,
        create_bnb_config(packing.quant_type, dtype, packing.use_double_quant) if packing.load_in_4bit else None,
        device=device,
        device_map=device_map,
        dtype=dtype,
        revision=source.model.revision,
        trust_remote_code=source.model.trust_remote_code,
        tokenizer=load_checked_tokenizer(source) if tokenizer is None else tokenizer,
    )
    check_vocabulary(source, tokenizer, model)
    adapted: Any = model if arguments.base_only else attach_adapter(model, source, device)
    if not arguments.base_only and does_nothing(adapted, source.folder):
        print(f"{source.folder} does nothing: all its B are zero, so every answer is the base model's", file=sys.stderr)
    if arguments.merged:
        adapted = fold(adapted)
    stop_ids = find_stop_ids(tokenizer, source.style) if source.stop_ids is None else source.stop_ids
    engine, note = choose_engine(adapted, tokenizer.pad_token_id)
    if note:
        print(note, file=sys.stderr)
    train_on = source.config.data.train_on
    fixed = "--merged" if arguments.merged else "--base_only" if arguments.base_only else None
    return Generator(engine, tokenizer, settings, stop_ids, arguments.seed, source.style, train_on, arguments.system, fixed)


def print_norm(generator: Generator, file: TextIO) -> None:
    from qlora_kit.adapter.attach import adapter_norm

    norm, projections = adapter_norm(generator.engine.model)
    print(f"adapter norm {norm:.4g}: root of the sum of ‖alpha/rank · B A‖² over {projections} projections", file=file)


def answer(generator: Generator, prompts: list[Prompt], arguments: argparse.Namespace) -> None:
    """In the mode asked for."""
    if arguments.mode == "text":
        run_text(generator, prompts, int(arguments.batch_size or BATCH_SIZE), arguments.compare, arguments.json)
    elif arguments.mode == "demo":
        run_demo(generator, prompts, not arguments.base_only, arguments.json)
        if not arguments.base_only:
            print_norm(generator, sys.stderr if arguments.json else sys.stdout)
    elif arguments.mode == "interactive":
        from qlora_kit.inference.conversation import run_interactive

        run_interactive(generator, arguments.compare)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_streams(arguments)
    check_flags(arguments)
    source = read_adapter(arguments.adapter, arguments.trust_remote_code)
    check_style(arguments, source)
    settings = sampling_settings(arguments, source.config)
    if arguments.merged:
        read_pairs(source.folder, f"--adapter {source.folder}")  # refuses what is no plain LoRA before anything is loaded
    prompts = read_prompts(arguments, source.style)
    cli.prepare_libraries()
    if not (is_local(source.model.name) and is_local(arguments.perplexity or ".")):
        go_offline_if_unreachable()
    for note in source.notes:
        print(note, file=sys.stderr)
    small_files = fetch_base(source, fetch_tokenizer)
    tokenizer = load_checked_tokenizer(source)
    encoder = PromptEncoder(tokenizer, source.style, source.config.data.train_on, arguments.system)
    prompts = encode_prompts(prompts, encoder, settings.max_new_tokens, read_context(small_files))
    if arguments.perplexity is not None:
        from qlora_kit.inference.compare import evaluation_blocks, run_perplexity

        blocks, what = evaluation_blocks(arguments.perplexity, source.config, tokenizer)
    fetch_base(source, fetch_model)
    generator = load_generator(source, settings, arguments, tokenizer)
    if arguments.perplexity is not None:
        aside = arguments.mode in ("text", "interactive")  # standard output is for answers
        run_perplexity(generator, blocks, what, source.config, arguments.json, arguments.base_only, aside)
    answer(generator, prompts, arguments)


if __name__ == "__main__":
    cli.run(main)
