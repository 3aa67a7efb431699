"""Talk to a trained adapter.

    python inference_example.py --mode interactive                     a prompt, streamed answers
    python inference_example.py --mode demo                            a set of prompts with their continuations
    python inference_example.py --mode text --prompt "The river"       only the generated text, for scripts

Base model, quantization and prompt style come from the adapter's folder. An adapter of running text continues its prompt.
"""

import argparse
import sys
from typing import Any

from qlora_kit import cli
from qlora_kit.adapter import AdapterSource, read_adapter
from qlora_kit.config import UserError, override
from qlora_kit.generation import DEMO_PROMPTS, Generator
from qlora_kit.hub import fetch_model, go_offline_if_unreachable, is_local
from qlora_kit.settings import Config, GenerationSettings

SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = cli.OneLineParser(description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["interactive", "demo", "text"], default="interactive")
    parser.add_argument(
        "--adapter",
        default="./output_qlora_qwen_3b",
        metavar="DIR",
        help="folder that train_qlora.py wrote (default: %(default)s)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="for --mode text; - reads it from standard input")
    parser.add_argument("--base_only", action="store_true", help="leave the adapter out, to see what it changes")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--seed", type=int, default=42, metavar="S", help="the same prompt and seed give the same text (default: %(default)s)"
    )
    parser.add_argument("--max_new_tokens", metavar="N", help="length of the answer at most")
    parser.add_argument("--temperature", metavar="T", help="0 always takes the likeliest token; higher is more varied")
    parser.add_argument("--top_p", metavar="P", help="sample from the likeliest tokens that make up this probability")
    parser.add_argument("--top_k", metavar="K", help="sample from this many likeliest tokens; 0 from all")
    parser.add_argument("--repetition_penalty", metavar="R", help="above 1 makes tokens that occurred already less likely")
    return parser.parse_args(argv)


def sampling_settings(arguments: argparse.Namespace, config: Config) -> GenerationSettings:
    """The adapter's own settings with the flags laid over them."""
    given = {f"generation.{flag}": getattr(arguments, flag) for flag in SAMPLING_FLAGS if getattr(arguments, flag) is not None}
    return override(config, given).generation


def read_prompt(arguments: argparse.Namespace) -> str | None:
    if arguments.mode != "text":
        return None
    if arguments.prompt is None:
        raise UserError('--prompt: --mode text needs one, such as --prompt "The river"; - reads it from standard input')
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise UserError("--prompt: the prompt is empty; give it some text")
    return prompt


def load_generator(source: AdapterSource, settings: GenerationSettings, arguments: argparse.Namespace) -> Generator:
    from peft import PeftModel
    from safetensors import SafetensorError

    from qlora_kit.decoding import LibraryEngine
    from qlora_kit.device import choose_device, usable_dtype
    from quantization_utils import create_bnb_config, load_model_and_tokenizer

    device = choose_device(arguments.device)
    dtype, note = usable_dtype(source.quantization.compute_dtype, device, insisted=False)
    if note:
        print(note, file=sys.stderr)
    packing = source.quantization
    model, tokenizer = load_model_and_tokenizer(
        source.model.name,
        create_bnb_config(packing.quant_type, dtype, packing.use_double_quant) if packing.load_in_4bit else None,
        device=device,
        dtype=dtype,
        revision=source.model.revision,
        trust_remote_code=source.model.trust_remote_code,
    )
    adapted: Any = model
    if not arguments.base_only:
        try:
            adapted = PeftModel.from_pretrained(model, source.folder, torch_device=device)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--adapter {source.folder}: does not fit {source.model.name} ({reason}); use the base model it was trained on"
            ) from error
        except SafetensorError as error:
            raise UserError(
                f"--adapter {source.folder}: adapter_model.safetensors is damaged ({error}); copy it again"
            ) from error
    engine = LibraryEngine(adapted, tokenizer.pad_token_id)
    stop_ids = sorted({number for number in (tokenizer.eos_token_id, source.separator_id) if number is not None})
    return Generator(engine, tokenizer, settings, stop_ids, arguments.seed, source.style, source.config.data.train_on)


def run_demo(generator: Generator) -> None:
    for prompt in DEMO_PROMPTS:
        (answer,) = generator.complete([generator.encode(prompt)])
        print(f"--- prompt: {prompt!r}")
        print(prompt + answer.text)
        print(f"--- {answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s\n", flush=True)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    source = read_adapter(arguments.adapter)
    settings = sampling_settings(arguments, source.config)
    prompt = read_prompt(arguments)
    cli.prepare_libraries()
    if not is_local(source.model.name):
        go_offline_if_unreachable()
    fetch_model(source.model)
    if not source.complete:
        packing = f"4-bit {source.quantization.quant_type.upper()}" if source.quantization.load_in_4bit else "16-bit"
        print(
            f"{source.folder} has no run.json: taking {source.model.name} in {packing}, prompts are continued as plain text",
            file=sys.stderr,
        )
    generator = load_generator(source, settings, arguments)
    if prompt is not None:
        print(generator.complete([generator.encode(prompt)])[0].text)
    elif arguments.mode == "demo":
        run_demo(generator)
    else:
        from qlora_kit.interactive import run_interactive

        run_interactive(generator)


if __name__ == "__main__":
    cli.run(main)
