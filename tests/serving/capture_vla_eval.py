"""Record vla_eval_0_8_0.msgpack: the messages between vla-eval's own client and server in one episode.

    python tests/serving/capture_vla_eval.py tests/serving/vla_eval_0_8_0.msgpack     (with vla-eval 0.8.0 installed)

The file contains the messages of both sides, and the images as decoded by vla-eval.
"""

import sys
from pathlib import Path

import anyio
import msgpack
import numpy as np
import websockets
from vla_eval.connection import Connection
from vla_eval.protocol import numpy_codec
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message, unpack_message

ACTION = np.float32([0.25, -1, 0, 0.5, 0, 0, 1])
client, server, images = [], [], []


async def serve(socket):
    async for frame in socket:
        client.append(frame)
        message = unpack_message(frame)
        if message.type == MessageType.HELLO:
            reply = Message(MessageType.HELLO, make_hello_payload(model_server="Golden", capabilities={}), message.seq)
        elif message.type == MessageType.OBSERVATION:
            images.append({name: [list(i.shape), i.tobytes()] for name, i in message.payload["images"].items()})
            reply = Message(MessageType.ACTION, {"actions": ACTION}, message.seq)
        else:
            continue
        server.append(pack_message(reply))
        await socket.send(server[-1])


async def play():
    row, column = np.mgrid[:16, :20]
    image = np.stack([8 * row, 8 * column, 4 * (row + column)], -1).astype(np.uint8)
    async with websockets.serve(serve, "127.0.0.1", 0, compression=None, max_size=None) as served:
        connection = Connection(f"ws://127.0.0.1:{served.sockets[0].getsockname()[1]}")
        await connection.connect(benchmark="vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark")
        task = {"name": "go", "suite": "libero_object", "task_id": 0, "episode_idx": 0}
        await connection.start_episode({"task": task})
        for form in ("png", "jpeg", "raw"):
            numpy_codec.set_image_format(form)
            observation = {
                "images": {"agentview": image, "wrist": 255 - image},
                "task_description": "go",
                "states": np.arange(7) / 8,
                "controller_states": np.zeros(8, np.float32),
            }
            await connection.act(observation)
        await connection.end_episode({"metrics": {"success": True}, "steps": 3, "elapsed_sec": 0.1})
        await connection.close()


anyio.run(play)
Path(sys.argv[1]).write_bytes(msgpack.packb({"client": client, "server": server, "images": images}))
