"""Talk to an adapter.

    python inference_example.py --mode interactive                     a prompt, streamed answers
    python inference_example.py --mode demo                            prompts that fit the adapter, answered with it and without
    python inference_example.py --mode text --prompt "The river"       only the generated text, for scripts
    python inference_example.py --perplexity FILE                      perplexity with the adapter and without

From Python:

    generator = inference_example.load_generator("./output_qlora_qwen_3b")
    print(generator.answer("The river").text)

Base model, quantization, prompt style and stop tokens come from the adapter's folder. An adapter trained on running text
continues its prompt; one trained on chats or instructions answers it. Several answers of --mode text have a line between them
that holds only a form feed; --json puts each answer on a line of its own. Messages about answers go to standard error.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import cli
from qlora_kit.adapter.folder import AdapterSource, fetch_base, load_checked_tokenizer, read_adapter
from qlora_kit.adapter.lora_pairs import read_pairs
from qlora_kit.config import GenerationSettings
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.data.folder import list_files
from qlora_kit.errors import UserError
from qlora_kit.inference.generator import FixedAdapter, Generator, replace_settings
from qlora_kit.inference.prompts import Prompt, PromptEncoder, demo_prompts, encode_prompts, read_prompt, read_prompt_file
from qlora_kit.inference.terminal import format_json
from qlora_kit.model import hub
from qlora_kit.shipped import locate
from qlora_kit.wrapping import say

if TYPE_CHECKING:
    from qlora_kit.inference.compare import Comparison

BATCH_SIZE = 8  # prompts answered at once
SEED = 42


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags and choose the default mode."""
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--mode",
        choices=["interactive", "demo", "text"],
        help="default: interactive; text with a prompt; none with --perplexity alone",
    )
    parser.add_argument(
        "--adapter",
        type=cli.nonempty,
        default="./output_qlora_qwen_3b",
        metavar="DIR",
        help="folder that train_qlora.py wrote, a checkpoint of it, or any LoRA or IA3 adapter of PEFT (default: %(default)s)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="for --mode text; - takes all of standard input as one prompt")
    parser.add_argument("--prompt_file", metavar="FILE", help="for --mode text: one prompt a line; - reads standard input")
    parser.add_argument("--batch_size", metavar="B", help="prompts of --prompt_file answered at once; from 1 (default: 8)")
    parser.add_argument("--json", action="store_true", help="one object a line: prompt, text, tokens, stop, seconds, seed")
    parser.add_argument("--system", metavar="TEXT", help="system message, for an adapter trained on chats")
    cli.add_loading_flags(parser)
    parser.add_argument("--base_only", action="store_true", help="leave the adapter out, to see what it changes")
    parser.add_argument("--compare", action="store_true", help="answer with and without the adapter; --mode demo always does")
    parser.add_argument(
        "--merged", action="store_true", help="fold the adapter into 16-bit weights first, if there is room: faster"
    )
    parser.add_argument(
        "--perplexity", type=cli.nonempty, metavar="DATA", help="file or data set: perplexity with and without the adapter on it"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        metavar="S",
        help="the same prompt and seed give the same text; to 2**32 - 1 (default: %(default)s)",
    )
    own = "(default: the adapter's own setting)"
    parser.add_argument("--max_new_tokens", metavar="N", help=f"limit of an answer's tokens; from 1 {own}")
    parser.add_argument("--temperature", metavar="T", help=f"0: always the likeliest token; up to 100: more varied {own}")
    parser.add_argument("--top_p", metavar="P", help=f"sample from the likeliest tokens of this probability together; to 1 {own}")
    parser.add_argument("--top_k", metavar="K", help=f"sample from this many likeliest tokens; 0: from all {own}")
    parser.add_argument(
        "--repetition_penalty", metavar="R", help=f"above 1: tokens that occurred get less likely; 0.01 to 100 {own}"
    )
    arguments = parser.parse_args(argv)
    if arguments.mode is None and (arguments.prompt is not None or arguments.prompt_file is not None):
        arguments.mode = "text"
    elif arguments.mode is None and arguments.perplexity is None:
        arguments.mode = "interactive"
    return arguments


def check_streams(arguments: argparse.Namespace) -> None:
    """Make pipes UTF-8 whatever the locale; a terminal keeps its own encoding.

    Raises:
        UserError: a stream that is needed was closed before the program began.
    """
    if sys.stdout is None:
        raise UserError("standard output", None, "is closed", "send it to a file, or to /dev/null")
    if sys.stdin is None and (arguments.mode == "interactive" or "-" in (arguments.prompt, arguments.prompt_file)):
        raise UserError("standard input", None, "is closed", "open it, or use --prompt TEXT")
    for stream in (sys.stdin, sys.stdout):
        cli.set_encoding(stream)


def check_flags(arguments: argparse.Namespace) -> None:
    """Check the flags against each other, and their values.

    Raises:
        UserError: flags cannot be combined, or a value is wrong.
    """
    mode, prompts = arguments.mode, [flag for flag in ("--prompt", "--prompt_file") if getattr(arguments, flag[2:]) is not None]
    prompt = prompts[0] if prompts else "--prompt"
    conflicts = [  # --merged leaves no base model to compare with
        (len(prompts) == 2, prompt, "cannot be combined with --prompt_file", "remove one"),
        (prompts and mode != "text", prompt, f"cannot be used with --mode {mode}", "use --mode text"),
        (mode == "text" and not prompts, prompt, "is needed by --mode text", 'use --prompt "The river", or - for standard input'),
        (arguments.compare and arguments.base_only, "--compare", "cannot be combined with --base_only", "remove one"),
        (arguments.merged and arguments.compare, "--merged", "cannot be combined with --compare", "remove one"),
        (arguments.merged and arguments.perplexity, "--merged", "cannot be combined with --perplexity", "remove one"),
        (arguments.merged and mode == "demo", "--merged", "cannot be used with --mode demo", "use --mode text"),
        (arguments.json and mode == "interactive", "--json", "cannot be used with --mode interactive", "use --mode text or demo"),
        (arguments.compare and mode is None, "--compare", "has no prompts to answer", "add --mode, or leave it out"),
    ]
    for is_wrong, flag, problem, remedy in conflicts:
        if is_wrong:
            raise UserError(flag, None, problem, remedy)
    check_seed(arguments.seed)
    if arguments.perplexity is not None and hub.is_local(arguments.perplexity):
        list_files(arguments.perplexity, "--perplexity")
    size = arguments.batch_size
    if size is not None and not (size.isdecimal() and int(size)):
        raise UserError("--batch_size", size, "is not a whole number of at least 1", f"leave it out for {BATCH_SIZE}")


def check_seed(seed: int) -> None:
    """Check that a seed is a whole number of 32 bits; raises UserError."""
    if not 0 <= seed < 2**32:
        raise UserError("--seed", seed, "is not a whole number from 0 to 2**32 - 1", f"leave it out for {SEED}")


def open_adapter(folder: str, system: str | None, merged: bool, trust_remote_code: bool) -> AdapterSource:
    """Read an adapter's folder and check what can be checked without the base model.

    Raises:
        UserError: the folder holds no usable adapter, or one that takes no system message, or one that cannot be folded.
    """
    source = read_adapter(folder, trust_remote_code)
    if system is not None and source.style != "chat":
        problem = f"cannot be used with {source.folder}, which was not trained on chats"
        raise UserError("--system", None, problem, "leave it out")
    if merged:
        read_pairs(source)
    return source


def sampling_settings(arguments: argparse.Namespace, own: GenerationSettings) -> GenerationSettings:
    """Return the adapter's own settings, changed by the flags; raises UserError with one problem for each wrong value."""
    flags = {key: getattr(arguments, key) for key in GenerationSettings.model_fields}
    given = {key: value for key, value in flags.items() if value is not None}
    return replace_settings(own, given, "--")


def read_prompts(arguments: argparse.Namespace, style: str) -> list[Prompt]:
    """Return the prompts of the flags or of the demo; none for --mode interactive."""
    if arguments.prompt is not None:
        return [read_prompt(arguments.prompt)]
    if arguments.prompt_file is not None:
        return read_prompt_file(arguments.prompt_file)
    return demo_prompts(style) if arguments.mode == "demo" else []


def load_encoder(source: AdapterSource, system: str | None, data: str = ".") -> tuple[PromptEncoder, int | None]:
    """Return the adapter's prompt encoder and the model's context in tokens; print what the folder leaves to assume.

    Args:
        data: a data set that will be read too: whether the Hub answers is tested once for both.

    Raises:
        UserError: the base model's tokenizer cannot be found or loaded, or has another vocabulary than in training.
    """
    hub.prepare(source.model.name, data)
    for note in source.notes:
        say(note)
    context = hub.read_context(fetch_base(source, hub.fetch_tokenizer))
    tokenizer = load_checked_tokenizer(source)
    stop_ids = find_stop_ids(tokenizer, source.style) if source.stop_ids is None else source.stop_ids
    return PromptEncoder(tokenizer, source.style, stop_ids, source.config.data.train_on, system), context


def choose_fixed(merged: bool, base_only: bool) -> FixedAdapter | None:
    """Return the flag after which the adapter cannot be switched on and off; raises UserError if both are set."""
    if merged and base_only:
        raise UserError("--merged", None, "cannot be combined with --base_only", "remove one")
    return "--merged" if merged else "--base_only" if base_only else None


def load_generator(
    adapter: str | Path,
    *,
    device: str = "auto",
    merged: bool = False,
    base_only: bool = False,
    settings: GenerationSettings | Mapping[str, Any] | None = None,
    system: str | None = None,
    seed: int = SEED,
    trust_remote_code: bool = False,
) -> Generator:
    """Load an adapter with its base model and return the generator that answers prompts.

        generator = load_generator("./output_qlora_qwen_3b", settings={"temperature": 0})
        generator.answer("The river").text

    Args:
        adapter: the folder that train_qlora.py wrote, a checkpoint of it, or any LoRA or IA3 adapter of PEFT.
        device: auto, cuda or cpu.
        merged: fold the adapter into 16-bit weights, which answers faster.
        base_only: leave the adapter out.
        settings: how to sample; keys of `generation` in a dict change the adapter's own settings, and None keeps them.
        system: the system message, for an adapter trained on chats.
        seed: the same prompt, settings and seed give the same answer.
        trust_remote_code: run Python code that comes with the base model.

    Raises:
        UserError: an argument is wrong, or adapter, tokenizer and base model cannot be loaded or do not fit together.
    """
    check_seed(seed)
    fixed = choose_fixed(merged, base_only)
    source = open_adapter(str(adapter), system, merged, trust_remote_code)
    if not isinstance(settings, GenerationSettings):
        settings = replace_settings(source.config.generation, settings or {}, "generation.")
    encoder, _ = load_encoder(source, system)

    from qlora_kit.inference.load import load_engine

    return Generator(load_engine(source, encoder.tokenizer, device, fixed=fixed), encoder, settings, seed, fixed)


def describe_model(source: AdapterSource, dtype: Any, fixed: FixedAdapter | None) -> list[str]:
    """Return lines that say which adapter and base model answer, and how precisely."""
    quantization, computing = source.quantization, f"computing in {str(dtype).removeprefix('torch.')}"
    adapter = {"--base_only": "none (--base_only)", "--merged": f"{source.folder}, folded into the weights"}
    is_packed = quantization.load_in_4bit and fixed != "--merged"
    return [
        f"Adapter     {adapter.get(fixed or '', source.folder)}",
        f"Base model  {source.model.name}, {f'4-bit {quantization.quant_type.upper()}, ' if is_packed else ''}{computing}",
    ]


def print_comparison(comparison: "Comparison", arguments: argparse.Namespace) -> None:
    """Print perplexities on standard output; on standard error, if standard output is for answers alone."""
    if arguments.json:
        print(format_json(comparison.as_object()), flush=True)
    else:
        file = sys.stderr if arguments.mode in ("text", "interactive") else sys.stdout
        say("\n".join(comparison.lines()), file)


def main(argv: list[str] | None = None) -> None:
    """Run the command: check everything that needs no model, load, measure, answer."""
    arguments = parse_arguments(argv)
    arguments.perplexity = arguments.perplexity and locate(arguments.perplexity)
    check_streams(arguments)
    check_flags(arguments)
    fixed = choose_fixed(arguments.merged, arguments.base_only)
    source = open_adapter(arguments.adapter, arguments.system, arguments.merged, arguments.trust_remote_code)
    settings = sampling_settings(arguments, source.config.generation)
    prompts = read_prompts(arguments, source.style)
    cli.prepare_libraries()
    with cli.busy("Loading the tokenizer"):
        encoder, context = load_encoder(source, arguments.system, arguments.perplexity or ".")
    prompts = encode_prompts(prompts, encoder, settings.max_new_tokens, context)

    with cli.busy("Loading the libraries"):  # which takes seconds
        from qlora_kit.inference import compare, load, modes

    if arguments.perplexity:
        blocks, name = compare.evaluation_blocks(arguments.perplexity, source.config, encoder.tokenizer)
    with cli.busy("Loading the model"):
        engine = load.load_engine(source, encoder.tokenizer, arguments.device, arguments.device_map, fixed)
    generator = Generator(engine, encoder, settings, arguments.seed, fixed)
    if arguments.perplexity:
        blocks, name = compare.choose_blocks(engine.model, blocks, name, source)
        say(f"Measuring perplexity on {name}: {len(blocks):,} blocks")
        print_comparison(compare.compare_perplexity(generator, blocks, name, source.config), arguments)
    printer = modes.choose_printer(arguments.mode, arguments.json, arguments.base_only)
    if arguments.mode == "text":
        modes.run_text(generator, prompts, int(arguments.batch_size or BATCH_SIZE), arguments.compare, printer)
    elif arguments.mode == "demo":
        modes.run_demo(generator, prompts, printer)
    elif arguments.mode == "interactive":
        modes.run_interactive(generator, arguments.compare, describe_model(source, engine.model.dtype, fixed))


if __name__ == "__main__":
    cli.run(main)
