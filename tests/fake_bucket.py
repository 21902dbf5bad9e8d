"""As much of Google Cloud Storage's JSON interface
as its real clients need to keep a run in a bucket.

    python tests/fake_bucket.py PORT

Objects live in memory and have generations; a write
or a delete can be made conditional on one, as OCDBT does.
"""

import email
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse

BUCKET = "runs"
_OBJECT = re.compile(
  r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)"
  r"(?:/(rewriteTo|copyTo|moveTo)/(?:b/([^/]+)/)?o/([^/]+))?$"
)


class Refused(Exception):
  """With a status code."""


class Bucket:
  def __init__(self):
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.uploads: dict[str, bytes] = {}
    self.generations = itertools.count(1)
    self.lock = threading.Lock()

  def check(self, name: str, query: dict[str, str]) -> None:
    generation = self.objects[name][0] if name in self.objects else 0
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
      raise Refused(412)
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
      raise Refused(304)

  def describe(self, name: str) -> dict:
    generation, data = self.objects[name]
    stamp = "2026-01-01T00:00:00.000Z"
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": BUCKET,
      "generation": str(generation),
      "metageneration": "1",
      "size": str(len(data)),
      "timeCreated": stamp,
      "updated": stamp,
    }

  def write(self, name: str, data: bytes, query: dict[str, str]) -> dict:
    self.check(name, query)
    self.objects[name] = (next(self.generations), data)
    return self.describe(name)

  def listing(self, query: dict[str, str]) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    for name in sorted(self.objects):
      if not name.startswith(prefix) or not query.get("startOffset", "") <= name < query.get(
        "endOffset", "\U0010ffff"
      ):
        continue
      head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
      if found:
        prefixes.add(prefix + head + delimiter)
      else:
        items.append(self.describe(name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  bucket = Bucket()

  def log_message(self, *args):
    pass

  def reply(self, status: int, body: bytes | dict = b"", headers=()) -> None:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    self.send_response(status)
    self.send_header("content-length", str(len(data)))
    self.send_header(
      "content-type", "application/json" if isinstance(body, dict) else "application/octet-stream"
    )
    for key, value in dict(headers).items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(data)

  def handle_any(self) -> None:
    body = self.rfile.read(int(self.headers.get("content-length") or 0))
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    try:
      with self.bucket.lock:
        self.answer(url.path, query, body)
    except Refused as refused:
      self.reply(
        refused.args[0], {"error": {"code": refused.args[0], "message": f"refused: {self.path}"}}
      )

  do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = handle_any

  def answer(self, path: str, query: dict[str, str], body: bytes) -> None:
    bucket = self.bucket
    if path == "/batch/storage/v1":
      self.batch(body)
    elif f"/b/{BUCKET}" not in path:
      raise Refused(404)
    elif path == f"/upload/storage/v1/b/{BUCKET}/o":
      self.upload(query, body)
    elif path == f"/storage/v1/b/{BUCKET}":
      self.reply(200, {"kind": "storage#bucket", "name": BUCKET})
    elif path == f"/storage/v1/b/{BUCKET}/o":
      self.reply(200, bucket.listing(query))
    elif match := _OBJECT.match(path):
      name, verb, target = (
        urllib.parse.unquote(match[2]),
        match[3],
        urllib.parse.unquote(match[5] or ""),
      )
      if name not in bucket.objects:
        raise Refused(404)
      bucket.check(name, query)
      if verb:
        written = bucket.write(target, bucket.objects[name][1], {})
        if verb == "moveTo":
          del bucket.objects[name]
        self.reply(200, {"done": True, "resource": written} if verb == "rewriteTo" else written)
      elif self.command == "DELETE":
        del bucket.objects[name]
        self.reply(204)
      elif query.get("alt") == "media":
        self.media(name)
      else:
        self.reply(200, bucket.describe(name))
    else:
      raise Refused(501)

  def media(self, name: str) -> None:
    generation, data = self.bucket.objects[name]
    headers = {
      "x-goog-generation": str(generation),
      "x-goog-metageneration": "1",
      "etag": f'"{generation}"',
    }
    if found := re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("range") or ""):
      size = len(data)
      first = int(found[1]) if found[1] else max(0, size - int(found[2]))
      last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
      if first >= size:
        raise Refused(416)
      headers["content-range"] = f"bytes {first}-{last}/{size}"
      self.reply(206, data[first : last + 1], headers)
    else:
      self.reply(200, data, headers)

  def upload(self, query: dict[str, str], body: bytes) -> None:
    name, kind = query.get("name", ""), query["uploadType"]
    if kind == "resumable" and "upload_id" not in query:
      number = str(next(self.bucket.generations))
      self.bucket.uploads[number] = b""
      place = urllib.parse.urlencode(
        {**query, "name": name or json.loads(body)["name"], "upload_id": number}
      )
      self.reply(
        200,
        b"",
        {"location": f"http://{self.headers['host']}/upload/storage/v1/b/{BUCKET}/o?{place}"},
      )
      return
    if kind == "resumable":
      number = query["upload_id"]
      body = self.bucket.uploads[number] = self.bucket.uploads[number] + body
      if self.headers["content-range"].endswith("/*"):  # More will come.
        self.reply(308, b"", {"range": f"bytes=0-{len(body) - 1}"})
        return
    elif kind == "multipart":
      described, body = self.parts(body)
      name = json.loads(described)["name"]
    self.reply(200, self.bucket.write(name, body, query))

  def parts(self, body: bytes) -> list[bytes]:
    head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
    return [
      part.get_payload(decode=True) for part in email.message_from_bytes(head + body).get_payload()
    ]

  def batch(self, body: bytes) -> None:
    """Deletes, several in one request."""
    replies = []
    for part in self.parts(body):
      found = _OBJECT.match(part.split()[1].decode().partition("?")[0])
      gone = self.bucket.objects.pop(urllib.parse.unquote(found[2]), None)
      status = "204 No Content" if gone else "404 Not Found"
      replies.append(
        f"--part\r\ncontent-type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n"
      )
    text = "".join(replies) + "--part--"
    self.reply(200, text.encode(), {"content-type": "multipart/mixed; boundary=part"})


class Server(http.server.ThreadingHTTPServer):
  request_queue_size = 1024
  daemon_threads = True


if __name__ == "__main__":
  Server(("localhost", int(sys.argv[1])), Handler).serve_forever()
