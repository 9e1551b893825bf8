"""Serving measured: the index beside raw FAISS, the service beside a no-op and beside vector databases.

    .venv/bin/python jobs/bench/serving.py --peers-python PATH            # 100,000 x 128: 11 minutes of two cores
    .venv/bin/python jobs/bench/serving.py --peers-python PATH --rows 1000000 --rounds 2

The peers live in an environment of their own (`serving_peers.py` says which packages); what it lacks is named in the
output. Every side is a process of its own, servers on one half of the cores and load generators on the other, asked in
turn, in rounds. Each side's search parameter is the smallest that reaches the recall aimed at, on the same queries.
Graphs have the same m and ef_construction for all (FAISS: 32 links at the lowest level, which is m = 16).

Vectors: `--embeddings` names an embeddings table; else WordLlama embeds lines of text out of the sources of the peers'
packages; without a peers' environment they are synthetic. Prints a section of Markdown.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from serving_peers import PEERS, free_port
from serving_report import report

HERE = Path(__file__).parent
QUERIES, TUNED_ON = 1024, 300
WIDTHS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
# A request of so many s: more clients are not put to it.
PATIENCE_S = 4.0


class Child:
    """A process that speaks in lines of JSON."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log = log
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            start_new_session=True,  # Ctrl-C ends the rounds, and they are closed in order
            env={**os.environ, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}", **environment},
        )
        self.pids = [self.process.pid]

    def hear(self) -> Any:
        """The next line. Raises RuntimeError with the end of the log if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            told = self.log.read_text(errors="replace").strip().splitlines() or ["it ended without a word"]
            raise RuntimeError(told[-1][:200])
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found

    def ask(self, **what: Any) -> Any:
        """The answer to a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()
        return self.hear()

    def tree(self) -> list[psutil.Process]:
        """Its processes, and those of servers that left it."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found += [process, *process.children(recursive=True)]
        return found

    def pin(self, cores: list[int]) -> None:
        """Every thread of it, and all to come, on these cores."""
        for process in self.tree():
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{process.pid}/task"):
                    os.sched_setaffinity(int(thread), cores)

    def cpu_s(self) -> float:
        """CPU time so far."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class Side:
    """One way to ask one system."""

    name: str
    how: str
    generator: Child
    server: Child
    batches: tuple[int, ...] = (1,)
    tuned: str = ""  # sides of one name here share a parameter
    configured: bool = False
    least: int = 10  # candidates that it wants at least
    note: str = ""
    parameter: int = 0
    recall: float | None = None
    found: dict[tuple[int, int], list[dict[str, float]]] = field(default_factory=dict)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="the Python that has the peers; without it rayemb is alone")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help="which of them")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--embeddings", help="embeddings table to take the vectors from")
    parser.add_argument("--factory", default="HNSW32", help="HNSW... or IVF...,Flat")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument(
        "--ingress", nargs="*", default=["HAProxy"], help="before Serve's replicas: HAProxy, proxy (its own)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--work", help="folder to keep vectors and logs in; default: a temporary one")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background the first is ignored
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o755)  # PostgreSQL does not run as root
        bench = Bench(options, Path(options.work or folder), Path(folder), stack)
        sys.stdout.write(bench.run() + "\n")


class Bench:
    """A run."""

    def __init__(self, options: argparse.Namespace, kept: Path, folder: Path, stack: contextlib.ExitStack) -> None:
        self.options, self.kept, self.folder, self.stack = options, kept, folder, stack
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        self.cores, self.server_cores, self.load_cores = cores, cores[:half], cores[half:] or cores
        self.sides: list[Side] = []
        self.missing: dict[str, str] = {}
        self.about: dict[str, str] = {}
        self.effort = "ef_search" if "HNSW" in options.factory else "nprobe"
        self.began = time.perf_counter()

    def run(self) -> str:
        """The section."""
        self.kept.mkdir(parents=True, exist_ok=True)
        source = self.vectors()
        self.x_ND, self.queries = (np.load(self.folder / f"{name}.npy") for name in ("vectors", "queries"))
        exact = self.queries @ self.x_ND.T
        self.last = -np.partition(-exact, 9, axis=1)[:, 9]
        del exact
        self.say("building rayemb's indexes")
        self.rayemb("build", factory=self.options.factory, cores=len(self.cores)).close()
        library = self.rayemb("library", effort=self.effort)
        self.services()
        for name in self.options.peers:
            self.peer(name)
        for side in self.sides:
            side.server.pin(self.server_cores)
            if side.generator is not side.server:
                side.generator.pin(self.load_cores)
        self.tune()
        inside = self.rounds(library)
        return report(self, source, inside)

    def say(self, what: str) -> None:
        """Progress."""
        sys.stderr.write(f"{time.perf_counter() - self.began:6.1f} s  {what}\n")

    def vectors(self) -> str:
        """Puts vectors and queries into the folder; what they are."""
        options, names = self.options, ("vectors.npy", "queries.npy")
        if options.embeddings:
            from rayemb.data.embeddings import EmbeddingsTable

            table = EmbeddingsTable.open(options.embeddings)
            rows = min(options.rows, table.rows - QUERIES)
            x_ND = np.random.default_rng(0).permutation(table.vectors(0, rows + QUERIES))
            source = f"vectors of {options.embeddings}"
        elif options.peers_python:
            made = self.kept / f"wordllama-{options.rows}"
            if not (made / names[1]).exists():
                made.mkdir(exist_ok=True)
                self.say("embedding lines of text")
                command = [options.peers_python, str(HERE / "serving_peers.py"), "vectors", str(made)]
                subprocess.run([*command, str(options.rows), str(QUERIES)], check=True)
            x_ND = np.concatenate([np.load(made / names[1]), np.load(made / names[0])])
            source = "real lines of text (sources of installed packages) embedded by WordLlama's static vectors"
        else:
            from faiss.contrib.datasets import SyntheticDataset

            x_ND = SyntheticDataset(128, 0, options.rows + QUERIES, 0).get_database()
            x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
            source = "synthetic vectors (faiss.contrib.datasets.SyntheticDataset), no real ones"
        np.save(self.folder / names[1], np.ascontiguousarray(x_ND[:QUERIES], np.float32))
        np.save(self.folder / names[0], np.ascontiguousarray(x_ND[QUERIES:], np.float32))
        return source

    # -- the sides -----------------------------------------------------------------------------------------------

    def child(self, command: list[str], name: str, **environment: str) -> Child:
        """A process that has said its first word, which is in `first`."""
        found = Child(command, self.kept / f"{name.replace(' ', '-')}.log", **environment)
        self.stack.callback(found.close)
        found.first = found.hear()  # type: ignore[attr-defined]
        return found

    def rayemb(self, role: str, **spec: Any) -> Child:
        """A process of rayemb's."""
        spec = {"threads": len(self.server_cores), "pinned": self.server_cores, **spec}
        command = [sys.executable, str(HERE / "serving_rayemb.py"), role, str(self.folder), json.dumps(spec)]
        return self.child(command, f"rayemb-{role}-{spec.get('ingress', '')}", OMP_NUM_THREADS=str(spec["threads"]))

    def http(self, python: str, address: dict[str, Any], **spec: Any) -> Child:
        """A generator over HTTP or gRPC."""
        spec = {**address, **spec, "effort": self.effort, "queries": str(self.folder / "queries.npy")}
        return self.child([python, str(HERE / "serving_load.py"), json.dumps(spec)], f"load-{spec['kind']}")

    def services(self) -> None:
        """rayemb's gateway, and no-ops, in uvicorn and on Serve."""
        arrow = "application/vnd.apache.arrow.stream"
        for ingress in ("uvicorn", *self.options.ingress):
            self.say(f"starting rayemb behind {ingress}")
            try:
                role = "uvicorn" if ingress == "uvicorn" else "serve"
                server = self.rayemb(role, port=free_port(), grpc=free_port(), ingress=ingress)
            except RuntimeError as error:
                self.missing[f"rayemb behind {ingress}"] = str(error)
                continue
            root = "" if ingress == "uvicorn" else "/rayemb"
            kinds: list[tuple[str, str, str, tuple[int, ...]]] = [
                ("no-op", "json", "/noop", (1,)),
                ("JSON", "json", f"{root}/v1/search/batch", (1, 64)),
                ("Arrow", "arrow", f"{root}/v1/search/batch", (1, 64)),
                ("gRPC", "grpc", "SearchBatch", (1, 64)),
                ("text, JSON", "text", f"{root}/v1/search", (1,)),
                ("text, gRPC", "grpc-text", "Search", (1,)),
            ]
            for how, kind, path, batches in kinds:
                first = server.first  # type: ignore[attr-defined]
                media = arrow if kind == "arrow" else "application/json"
                more = {"application": "rayemb"} if kind.startswith("grpc") else {}
                generator = self.http(sys.executable, first, kind=kind, path=path, type=media, **more)
                tuned = "rayemb" if how in ("JSON", "Arrow", "gRPC") else ""
                name = "no-op" if how == "no-op" else "rayemb"
                self.sides.append(Side(f"{name}, {ingress}", how, generator, server, batches, tuned))

    def peer(self, name: str) -> None:
        """A peer: its server loaded, its generator ready; or why not."""
        python = self.options.peers_python
        if not python:
            self.missing[name] = "no --peers-python"
            return
        self.say(f"building {name}")
        script, folder = str(HERE / "serving_peers.py"), str(self.folder / name)
        vectors = str(self.folder / "vectors.npy")
        begin = time.perf_counter()
        try:
            server = self.child([python, script, "serve", name, folder, vectors], name)
            first = server.first  # type: ignore[attr-defined]
            server.pids += first.get("pids", [])
            inside = "folder" in first
            if first.get("kind") == "chroma":
                generator, how = self.http(python, first), "JSON"
            else:
                spec = {**first, "vectors": vectors, "queries": str(self.folder / "queries.npy")}
                generator = self.child([python, script, "load", name, json.dumps(spec)], f"{name}-load")
                how = "in process" if inside else ("gRPC" if "index" in first else "TCP, binary")
        except RuntimeError as error:
            self.missing[name] = str(error)
            return
        self.about[name] = f"{first['version']}, {first.get('index', 'HNSW')}, {time.perf_counter() - begin:.0f} s"
        server = generator if inside else server
        configured = bool(first.get("configured"))
        least = first.get("least", 10)
        self.sides.append(Side(name, how, generator, server, (1, 64), name, configured, least))

    # -- measuring -----------------------------------------------------------------------------------------------

    def recall(self, rows: Any) -> float:
        """Share of the ten nearest that were found; what is as near as the tenth counts."""
        found = 0
        for i, row in enumerate(rows):
            keys = [key for key in dict.fromkeys(row) if key >= 0][:10]
            found += int((self.x_ND[keys] @ self.queries[i] >= self.last[i] - 1e-6).sum())
        return found / (10 * len(rows))

    def tune(self) -> None:
        """The smallest parameter of each side that reaches the recall."""
        chosen: dict[str, tuple[int, float]] = {}
        for side in self.sides:
            if side.tuned and side.tuned not in chosen:
                try:
                    chosen[side.tuned] = self.smallest(side)
                except RuntimeError as error:
                    side.note = f"could not be asked: {error}"
                    continue
                self.say(f"{side.tuned}: {chosen[side.tuned][0]}, recall {chosen[side.tuned][1]:.3f}")
            side.parameter, _ = chosen.get(side.tuned, (0, 0.0))
            if side.tuned:
                side.recall = self.recall(side.generator.ask(do="rows", count=QUERIES, parameter=side.parameter))

    def smallest(self, side: Side) -> tuple[int, float]:
        """The parameter and its recall, by bisection; the largest where none reaches it."""
        # A graph search keeps at least as many candidates as hits are asked for.
        graph = self.effort == "ef_search" or side.tuned != "rayemb"
        widths = [each for each in WIDTHS if each >= side.least or not graph]
        low, high, found = 0, len(widths) - 1, 0.0
        while low < high:
            middle = (low + high) // 2
            reached = self.reached(side, widths[middle])
            low, high, found = (low, middle, reached) if reached >= self.options.recall else (middle + 1, high, found)
        if not found:
            found = self.reached(side, widths[low])
        elif side.configured:
            side.server.ask(parameter=widths[low])
        return widths[low], found

    def reached(self, side: Side, parameter: int) -> float:
        """Recall with that parameter."""
        if side.configured:
            side.server.ask(parameter=parameter)
        return self.recall(side.generator.ask(do="rows", count=TUNED_ON, parameter=parameter))

    def rounds(self, library: Child) -> dict[tuple[str, int], list[dict[str, float]]]:
        """All phases, interleaved; what `library` found is given back, the rest is in the sides."""
        inside: dict[tuple[str, int], list[dict[str, float]]] = {}
        parameter = next(side.parameter for side in self.sides if side.tuned == "rayemb")
        names = library.first["sides"]  # type: ignore[attr-defined]
        self.inside_recall = {
            name: self.recall(library.ask(do="rows", side=name, parameter=parameter)) for name in names
        }
        with contextlib.suppress(KeyboardInterrupt):  # what there is by then is printed
            for number in range(self.options.rounds):
                self.say(f"round {number + 1}")
                for batch in (1, 64):
                    for name in names:
                        told = {"side": name, "parameter": parameter, "batch": batch, "seconds": self.options.seconds}
                        inside.setdefault((name, batch), []).append(library.ask(do="load", **told))
                for batch in (64, 1):
                    for clients in self.options.clients:
                        # Batches of 64 keep any server busy with few clients.
                        if batch == 1 or clients <= 8:
                            self.phase(clients, batch)
        return inside

    def phase(self, clients: int, batch: int) -> None:
        """One phase of every side."""
        for side in self.sides:
            if batch not in side.batches or side.note:
                continue
            before = [min(each["qps"] for each in got) / key[1] for key, got in side.found.items() if key[1] == batch]
            if before and clients / max(before) > PATIENCE_S:
                continue
            used = side.server.cpu_s()
            told = {"clients": clients, "seconds": self.options.seconds, "batch": batch, "parameter": side.parameter}
            try:
                got = side.generator.ask(do="load", **told)
            except RuntimeError as error:
                side.note = f"failed: {error}"
                continue
            got["cpu"] = (side.server.cpu_s() - used) * 1000 / max(1.0, got["qps"] * self.options.seconds)
            side.found.setdefault((clients, batch), []).append(got)


if __name__ == "__main__":
    main()
