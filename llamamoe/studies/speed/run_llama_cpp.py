"""Time one GGUF file and print tokens per second as JSON; run by an interpreter with llama.cpp (``xllamacpp``).

    python run_llama_cpp.py FILE THREADS PROMPT NEW VOCABULARY BATCH...

A separate script because llama.cpp's programs are kept in a separate environment, and because it writes to the
terminal freely. Tokens are drawn at random, in prompts and continuations: a model of random weights that decoded
greedily would repeat the same token, and use the same experts.
"""

import json
import os
import random
import sys
import threading


class Server:
    """llama.cpp's server with one slot for each sequence, with all weights in memory before the timing starts."""

    def __init__(self, path: str, threads: int, context: int, slots: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel = context * slots, slots
        params.warmup, params.fit_params, params.cache_ram_mib = False, False, 0
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def timings(self, prompt: list[int], new: int, slot: int) -> dict[str, float]:
        """Complete a prompt; return the server's timings."""
        answer = self._server.handle_completions(
            {
                "prompt": prompt, "n_predict": new, "max_tokens": new, "ignore_eos": True, "cache_prompt": False,
                "temperature": 1.0, "top_k": 40, "seed": prompt[0], "id_slot": slot,
            }
        )  # fmt: skip
        found = answer if isinstance(answer, dict) else json.loads(answer)
        timings: dict[str, float] = found["timings"]
        return timings


def decode(server: Server, batch: int, new: int, vocabulary: int) -> float:
    """Return the tokens per second of sequences that run together, without their prompts."""
    prompts = [_prompt(8, vocabulary) for _ in range(batch)]
    found = [0.0] * batch

    def one(slot: int) -> None:
        found[slot] = server.timings(prompts[slot], new, slot)["predicted_per_second"]

    threads = [threading.Thread(target=one, args=(slot,)) for slot in range(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(found)


def _prompt(length: int, vocabulary: int) -> list[int]:
    return [random.randrange(vocabulary // 4, vocabulary) for _ in range(length)]


def main(path: str, threads: int, prompt: int, new: int, vocabulary: int, batches: list[int]) -> dict[str, object]:
    """Time a file."""
    random.seed(0)
    server = Server(path, threads, prompt + new + 64, max(batches))
    decode(server, 1, 2, vocabulary)  # warms up
    rates = {f"decode {batch}": decode(server, batch, new, vocabulary) for batch in batches}
    rates["prefill"] = server.timings(_prompt(prompt, vocabulary), 1, 0)["prompt_per_second"]
    return {"rates": rates}


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[2:]))
    answer = main(sys.argv[1], *numbers[:4], numbers[4:])  # type: ignore[call-arg, arg-type]
    sys.stdout.flush()
    os.write(1, ("\n" + json.dumps(answer) + "\n").encode())
    os._exit(0)  # the server's threads are not waited for
