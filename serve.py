"""A page to talk to the model, and the API that OpenAI's clients speak.

    python serve.py                                              # the newest model of out/, at http://127.0.0.1:8000
    python serve.py --ckpt llava-1.5-7b-hf/ --port 8080
    curl 127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "hello"}]}'

Pictures come as data URLs and stand in front of their message's text. An answer is, token for token, what
sample.py says with --beams 1: greedy unless a temperature is given, so that it can be streamed and stopped.
"task" in a request is ours: caption, vqa, ground or region, asked as sample.py --task asks them.

There is one model and one line of requests in front of it. A connection carries one request, and nothing that
is asked here reads a file, fetches an address or changes anything.
"""

import base64
import json
import math
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from argparse import ArgumentTypeError
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import SimpleNamespace

from support.threads import wait_briefly

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import
    wait_briefly()

import sample
import toy
from formats.pictures import peek, upright
from formats.records import clean
from support.commands import Parser, amount, natural, number, positive, run
from support.errors import BadInput
from support.processes import on_signals
from support.start import DTYPES, adapter_kind, newest
from text import encode_prompt, encode_turns
from text.templates import MARK, TASKS, chat_turn, own_words, prompt

PAGE = Path(__file__).parent / "support/page.html"
QUEUE = 8  # requests that may wait for the model
CONNECTIONS = 64  # at a time
SENDING = 30  # seconds in which a request must have come
READING = 5  # seconds in which a client must take a piece of its answer
BODY = 2**24  # bytes of a request
TEXT = 100_000  # characters of a conversation
PICTURES = 8  # of a conversation
STOPS = 1000  # characters of what ends an answer
SCENES = 6  # held-out scenes of the toy world that the page offers
DATA_URL = re.compile("data:image/[^,]*;base64,([^,]*)")
NUMBERS = {  # of a request: sample.py's setting, and what reads it
    "max_tokens": ("max_new_tokens", positive),
    "max_completion_tokens": ("max_new_tokens", positive),
    "temperature": ("temperature", amount),
    "top_p": ("top_p", number(float, 1e-6, 1)),
    "seed": ("seed", natural),
}
OTHERS = {
    "messages": list,
    "model": str,
    "stream": bool,
    "stream_options": dict,
    "stop": (str, list),
    "task": str,
    "user": str,
}
NOTHING = (None, False, 0, [], {})  # values that ask for nothing, of whatever field
NONCE = secrets.token_urlsafe(16)  # what the page's own script and style have, and nothing else
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; "
    f"script-src 'nonce-{NONCE}'; style-src 'nonce-{NONCE}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Refused(BadInput):
    """A request that is answered with a status of its own; other bad input is a 400."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


# ---------------------------------------------------------------------------------------------------
# Requests


def read_request(body, name):
    """The JSON of a request -> (fields, settings of Chat.answer); whatever is wrong with it is bad input."""
    try:
        fields = dict(json.loads(body))
    except (ValueError, TypeError, RecursionError):
        raise BadInput("the body is no JSON object") from None
    asked = {}
    for field, value in fields.items():
        if field in NUMBERS and value is not None:
            setting, read = NUMBERS[field]
            try:
                asked[setting] = read(str(value))
            except ArgumentTypeError as e:
                raise BadInput(f"{field}: {e}") from None
        elif (field, value) != ("n", 1) and value not in NOTHING:
            if not isinstance(value, OTHERS.get(field, ())):
                raise BadInput(f"{field}: is not known here, or of another type")
    if fields.get("model") not in (None, name):
        raise Refused(404, f"model: only {name} answers here")
    task = fields["task"] = fields.get("task") or "chat"
    if task not in TASKS:
        raise BadInput(f"task: is none of {', '.join(TASKS)}")
    stop = fields.get("stop") or []
    if len(str(stop)) > STOPS:
        raise BadInput(f"stop: has over {STOPS} characters; shorten it")
    fields["stop"] = [stop] if isinstance(stop, str) else list(map(str, stop))
    return fields, {"max_new_tokens": sample.DECODING[task]["max_new_tokens"]} | asked


def to_ids(fields, model, tokenizer):
    """The ids that the answer follows, and the pictures among them, (3,S,S) each."""
    config, task = model.config, fields["task"]
    contents = [read_message(message, n) for n, message in enumerate(fields.get("messages") or [])]
    if len(contents) % 2 == 0:
        raise BadInput("messages: the last one must be the user's")
    urls = sum([shown for _, shown in contents], [])
    if len(urls) > PICTURES or sum(len(text) for text, _ in contents) > TEXT:
        raise BadInput(
            f"messages: have over {PICTURES} pictures or {TEXT} characters; shorten them"
        )
    if task == "chat":
        turns = []
        for (text, shown), (answer, _) in zip(contents[::2], contents[1::2] + [(None, [])]):
            text = "\n".join([config.image_mark] * len(shown) + [text])
            turns.append((chat_turn(text, tokenizer.template, first=not turns), answer))
        ids, _ = encode_turns(tokenizer, turns, config.visual_tokens, config.llm.context)
    else:
        if len(contents) != 1 or len(urls) != 1:
            raise BadInput(f"task: {task} is asked in one message with one picture")
        text = sample.question(SimpleNamespace(task=task, prompt=contents[0][0]))
        task, text = own_words(task, text, tokenizer.template)
        text = prompt(task, text, template=tokenizer.template).replace(MARK, config.image_mark)
        ids = encode_prompt(tokenizer, text, config.visual_tokens)
    sample.check_length(ids, config, "the conversation")
    side, pad = config.vit.image_size, TASKS[task].pad
    return ids, [sample.square(read_picture(url), side, pad) for url in urls]


def read_message(message, n):
    """The n-th message of a conversation -> (text, the addresses of its pictures)."""
    where = f"messages[{n}]"
    role = ("user", "assistant")[n % 2]
    match message:
        case {"role": said, "content": str() | list() as content} if said == role:
            pass
        case _:
            raise BadInput(
                f"{where}: is no message of the {role} with a content; a system prompt is the model's own"
            )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    texts, urls = [], []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(clean(text, where))
            case {"type": "image_url", "image_url": {"url": str(url)}} if role == "user":
                urls.append(url)
            case _:
                raise BadInput(f"{where}: has a part that is no text and no image_url of the user")
    return "\n".join(texts).strip(), urls


def read_picture(url):
    try:
        content = base64.b64decode(DATA_URL.fullmatch(url)[1], validate=True)
    except (TypeError, ValueError):
        raise BadInput(
            "image_url: is no data URL (data:image/png;base64,...), and no address is fetched"
        ) from None
    return upright(peek((content, 0, -1), "image_url"))


# ---------------------------------------------------------------------------------------------------
# The model and its line


class Server(ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = CONNECTIONS

    def __init__(self, host, port, name, model, tokenizer):
        self.name = name
        self.talk = sample.Chat(model, tokenizer)
        self.waiting = []  # requests; the first of them has the model
        self.moved = threading.Condition()
        self.deadlines = {}  # connections, and when a request must have come
        super().__init__((host, port), Handler)

    @contextmanager
    def turn(self, left):
        """The model, first come first served; `left` says whether the client has gone."""
        me = object()
        with self.moved:
            if len(self.waiting) > QUEUE:
                raise Refused(429, f"{QUEUE} requests are waiting already; come again")
            self.waiting.append(me)
        try:
            with self.moved:
                while self.waiting[0] is not me:
                    self.moved.wait(0.2)
                    if left():
                        raise ConnectionAbortedError
            yield
        finally:
            with self.moved:
                self.waiting.remove(me)
                self.moved.notify_all()

    def answer(self, ids, pictures, settings, stops):
        """Yield (text, None) piece by piece, and (text, why it ends) at the end."""
        self.talk.start()
        said = ""  # and not yet yielded: a text that ends the answer may have begun in it
        for piece in self.talk.answer([*ids], pictures, **settings):
            said += piece
            ends = [said.index(stop) for stop in stops if stop in said]
            if ends:
                yield said[: min(ends)], "stop"
                return
            begun = (n for stop in stops for n in range(len(stop)) if said.endswith(stop[:n]))
            sure = len(said) - max(begun, default=0)
            yield said[:sure], None
            said = said[sure:]
        limits = (self.talk.model.config.llm.context, len(ids) + settings["max_new_tokens"])
        yield said, "length" if len(self.talk.ids) in limits else "stop"

    def process_request(self, connection, address):
        self.deadlines[connection] = time.monotonic() + SENDING
        if len(self.deadlines) <= CONNECTIONS:
            return super().process_request(connection, address)
        connection.sendall(b"HTTP/1.0 429 Too Many Requests\r\nRetry-After: 1\r\n\r\n")
        self.close_request(connection)

    def service_actions(self):
        """From those whose time is up nothing more is read: slow senders, however slow."""
        for connection, deadline in list(self.deadlines.items()):
            if time.monotonic() > deadline:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def shutdown_request(self, connection):
        """Let what a client still sends run dry before it is closed, or it would not read its answer."""
        until = time.monotonic() + 2
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1)
            while time.monotonic() < until and connection.recv(2**16):
                pass
        self.close_request(connection)

    def close_request(self, connection):
        self.deadlines.pop(connection)
        connection.close()

    def handle_error(self, connection, address):
        """A client that hung up is no error, and what else fails has been said by the handler."""


# ---------------------------------------------------------------------------------------------------
# HTTP


class Handler(BaseHTTPRequestHandler):
    sys_version = ""
    default_request_version = "HTTP/1.0"  # an answer to nonsense has a status line, too
    timeout = SENDING
    streaming = False

    def do_GET(self):
        """Whatever happens, the client gets a status and the server goes on."""
        try:
            self.act()
        except BadInput as e:
            text = re.sub(r" <\S+ object at \w+>", "", str(e))
            self.send_error(getattr(e, "status", 400), text)
        except OSError:
            pass
        except Exception:
            traceback.print_exc()
            self.send_error(500, "the server failed; what it printed says why")

    do_POST = do_GET

    def act(self):
        # a page from elsewhere must not use the model, not even under a name of its own for this machine
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        known = re.fullmatch(r"(localhost|[\d.]+)(:\d+)?", host)
        if not known or origin.partition("://")[2] != host:
            raise Refused(403, "Host, Origin: only this server's own page and address may be used")
        asked = f"{self.command} {self.path}"
        scene = re.fullmatch(r"GET /scenes/(\d)", asked)
        if asked == "POST /v1/chat/completions":
            self.post()
        elif asked == "GET /v1/models":
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "you"}
            self.reply_json(200, {"object": "list", "data": [model]})
        elif asked == "GET /health":
            self.reply_json(200, {"status": "ok", "waiting": len(self.server.waiting)})
        elif asked == "GET /":
            page = PAGE.read_bytes().replace(b"NONCE", NONCE.encode())
            self.reply(200, "text/html; charset=utf-8", page)
        elif scene and int(scene[1]) < SCENES:
            png = BytesIO()
            toy.draw(toy.scene(0, "heldout", int(scene[1]))).save(png, "PNG")
            self.reply(200, "image/png", png.getvalue())
        else:
            raise Refused(404, "there is nothing at this address")

    def post(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,18}", length):
            raise Refused(411, "Content-Length: is needed, in digits")
        length = int(length)
        if length > BODY:
            raise Refused(413, f"the body has over {BODY} bytes; send fewer or smaller pictures")
        body = self.rfile.read(length)
        if len(body) < length:
            raise BadInput(f"the body has {len(body)} bytes of the {length} that were announced")
        self.server.deadlines[self.connection] = math.inf
        self.connection.settimeout(READING)
        with self.server.turn(self.left):
            self.complete(*read_request(body, self.server.name))

    def left(self):
        """Whether the client has hung up."""
        readable = select.select([self.connection], [], [], 0)[0]
        return readable and not self.connection.recv(1, socket.MSG_PEEK)

    def complete(self, fields, settings):
        """Answer as OpenAI's chat completions do, at once or in pieces."""
        talk = self.server.talk
        ids, pictures = to_ids(fields, talk.model, talk.tokenizer)
        answer = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.server.name,
        }
        message = {"role": "assistant", "content": ""}
        for text, reason in self.server.answer(ids, pictures, settings, fields["stop"]):
            if self.left():
                raise ConnectionAbortedError
            message["content"] += text
            choice = {"index": 0, "finish_reason": reason}
            if reason:
                counts = {"prompt_tokens": len(ids), "total_tokens": len(talk.ids)}
                answer["usage"] = counts | {"completion_tokens": len(talk.ids) - len(ids)}
            if fields.get("stream"):
                choice["delta"] = {"content": text} if self.streaming else message
                self.send_event(answer | {"object": "chat.completion.chunk", "choices": [choice]})
        if self.streaming:
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.reply_json(200, answer | {"choices": [choice | {"message": message}]})

    def send_event(self, event):
        content = f"data: {json.dumps(event)}\n\n".encode()
        if self.streaming:
            self.wfile.write(content)
        else:
            self.reply(200, "text/event-stream", content)
            self.streaming = True

    def send_error(self, status, message=None, explain=None):
        """In OpenAI's shape. The library refuses with it, too, what cannot be read as HTTP, or is too long."""
        text = (message or "this is no HTTP")[:500]
        error = {
            "error": {"message": text, "type": "invalid_request_error", "param": None, "code": None}
        }
        with suppress(OSError):
            if self.streaming:
                self.send_event(error)
            else:
                self.reply_json(status, error)

    def reply_json(self, status, value):
        self.reply(status, "application/json", json.dumps(value).encode())

    def reply(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


# ---------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = Parser(__doc__)
    flag = parser.flag
    for name in ("ckpt", "branch", "tokenizer", "device"):
        flag(f"--{name}", str, f"as sample.py --{name}")
    flag("--adapter", adapter_kind, "as sample.py --adapter")
    flag("--dtype", DTYPES, "as sample.py --dtype")
    flag("--host", str, "address to listen at; default 127.0.0.1: this machine alone", "127.0.0.1")
    flag("--port", number(int, 0, 65535), "default 8000; 0: any that is free", 8000)
    args = parser.parse_args(argv)
    name = Path(args.ckpt or newest()).resolve().name
    model, tokenizer = sample.load(args)
    try:
        server = Server(args.host, args.port, name, model, tokenizer)
    except OSError as e:
        raise BadInput(f"{args.host}:{args.port}: {e.strerror}; name another --port") from None
    with server, on_signals(lambda _: threading.Thread(target=server.shutdown).start()):
        host, port = server.server_address
        print(f"{name} answers at http://{host}:{port}", flush=True)
        server.serve_forever(0.1)
        for connection in list(server.deadlines):  # those who wait see their clients gone
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    sys.exit(run(main))
