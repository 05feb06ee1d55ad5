"""What `helm test` runs: a ready Service, one answer with the key, none without."""

import json
import os
import time
import urllib.error
import urllib.request

URL, MODEL, KEY = os.environ["URL"], os.environ["MODEL"], os.environ["KEY"].strip()
WAIT_S = 300


def call(path, body=None, key=None):
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers), timeout=60) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
    except OSError as e:
        return 0, str(e)


deadline = time.monotonic() + WAIT_S
while (found := call("/readyz"))[0] != 200:
    if time.monotonic() > deadline:
        raise SystemExit(f"FAILED: {URL}/readyz is not ready after {WAIT_S} s: {found}")
    time.sleep(2)
question = {"model": MODEL, "prompt": "Steelyard is", "max_tokens": 8}
status, text = call("/v1/completions", question)
if status != 401:
    raise SystemExit(f"FAILED: without a key the answer is {status}, not 401: {text[:300]}")
status, text = call("/v1/completions", question, KEY)
if status != 200 or not json.loads(text)["choices"]:
    raise SystemExit(f"FAILED: {MODEL} answered {status}: {text[:300]}")
print(f"ok: {MODEL} answers: {json.loads(text)['choices'][0]['text']!r}")
