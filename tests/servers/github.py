"""GitHub's REST API as far as a GitHub App needs it, for one test, as docs.github.com publishes it: app
JWTs are verified by an independent library (PyJWT), installation tokens are issued as narrow as asked for,
and ended by DELETE /installation/token. Base path as an Enterprise server has it: /api/v3.

Arguments: the app's public key (PEM), the app's id, and how to behave: honest, wide (issues more than was
asked for). Prints its port, then every request it served as a line of JSON."""

import datetime
import http.server
import json
import secrets
import sys

import jwt

PUBLIC_KEY, APP_ID, BEHAVIOUR = open(sys.argv[1]).read(), sys.argv[2], sys.argv[3]
INSTALLATION, OWNER = 4711, "acme"
REPOSITORIES = {"insights", "secrets", "site"}
GRANTED = {"contents": "write", "issues": "write", "metadata": "read"}
LEVELS = ["read", "write", "admin"]
tokens = {}


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body=None):
        said = {"method": self.command, "path": self.path, "status": status,
                "request_id": self.headers.get("x-request-id")}
        print(json.dumps(said), flush=True)
        text = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass

    def body(self):
        length = int(self.headers.get("Content-Length") or 0)
        return json.loads(self.rfile.read(length) or b"{}")

    def bearer(self):
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if kind == "Bearer" else None

    def is_app(self):
        """The rules of "Generating a JSON Web Token (JWT) for a GitHub App"."""
        try:
            claims = jwt.decode(self.bearer(), PUBLIC_KEY, algorithms=["RS256"],
                                options={"require": ["iat", "exp", "iss"]})
        except Exception as e:
            return self.answer(401, {"message": f"A JSON web token could not be decoded: {e}"})
        if str(claims["iss"]) != APP_ID or claims["exp"] - claims["iat"] > 600:
            return self.answer(401, {"message": "'Expiration time' claim is too far in the future"})
        if self.headers.get("X-GitHub-Api-Version") != "2022-11-28":
            return self.answer(400, {"message": "no such version"})
        return True

    def do_GET(self):
        parts = self.path.removeprefix("/api/v3/").split("/")
        if parts[0] == "repos" and parts[-1] == "installation":
            if self.is_app():
                known = parts[1] == OWNER and parts[2] in REPOSITORIES
                return self.answer(*((200, {"id": INSTALLATION}) if known else (404, {"message": "Not Found"})))
            return
        # What a token is for: a repository's contents.
        token = tokens.get(self.bearer())
        if token is None:
            return self.answer(401, {"message": "Bad credentials"})
        if parts[0] == "repos" and parts[2] in token["repositories"]:
            return self.answer(200, {"full_name": f"{OWNER}/{parts[2]}"})
        self.answer(404, {"message": "Not Found"})

    def do_POST(self):
        body = self.body()
        if self.path != f"/api/v3/app/installations/{INSTALLATION}/access_tokens":
            return self.answer(404, {"message": "Not Found"})
        if not self.is_app():
            return
        names = set(body.get("repositories", REPOSITORIES))
        wanted = body.get("permissions", GRANTED)
        too_much = [p for p, l in wanted.items() if LEVELS.index(l) > LEVELS.index(GRANTED.get(p, "read"))]
        if not names <= REPOSITORIES or too_much:
            return self.answer(422, {"message": "The permissions requested are not granted"})
        if BEHAVIOUR == "wide":
            names |= {"secrets"}
        # Stateless, as GitHub issues them since 2026: the prefix and a JWT, longer than any before.
        token = "ghs_" + jwt.encode({"jti": secrets.token_urlsafe(600), "repos": sorted(names)}, secrets.token_bytes(32))
        tokens[token] = {"repositories": names}
        expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
        self.answer(201, {
            "token": token,
            "expires_at": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "permissions": {**wanted, "metadata": "read"},
            "repository_selection": "selected",
            "repositories": [{"id": 1, "name": n, "full_name": f"{OWNER}/{n}"} for n in sorted(names)],
        })

    def do_DELETE(self):
        if self.path != "/api/v3/installation/token":
            return self.answer(404, {"message": "Not Found"})
        if tokens.pop(self.bearer(), None) is None:
            return self.answer(401, {"message": "Bad credentials"})
        self.answer(204)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
