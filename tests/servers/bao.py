"""A Vault or OpenBao server, as far as the tests ask it, written from OpenBao's published API
(openbao.org/api-docs): KV v2, a dynamic engine (`database/creds/ROLE`) whose leases are renewed and revoked,
AppRole and JWT logins, tokens that are ended with all that hangs on them. Seals, storage and policies are
not here.

Arguments: how long a lease of the dynamic engine lasts, in seconds; and, for JWT logins as its `jwt` method has
them with `oidc_discovery_url`: the issuer, the role's `bound_audiences` and `bound_subject`. They are verified
with PyJWT by the keys that the issuer publishes; without these arguments one fixed word is taken. Prints its port,
then what it did as lines of JSON."""

import http.server
import json
import secrets
import sys
import time
import urllib.request

import jwt

LEASE = float(sys.argv[1])
ISSUER, BOUND_AUDIENCE, BOUND_SUBJECT = sys.argv[2:5] if len(sys.argv) > 2 else (None, None, None)
ROOT, ROLE_ID, SECRET_ID, JWT = "root-token-0123456789", "role-1", "secret-id-0123456789", "header.claims.signature"
tokens = {ROOT: None}
leases = {}


def say(**what):
    print(json.dumps(what), flush=True)


def drop(lease, why):
    leases.pop(lease, None)
    say(lease=lease, ended=why)


def claims_of(assertion):
    """Of a JWT login, or None where it is refused."""
    try:
        with urllib.request.urlopen(ISSUER + "/.well-known/openid-configuration") as answer:
            discovery = json.load(answer)
        signing = jwt.PyJWKClient(discovery["jwks_uri"]).get_signing_key_from_jwt(assertion)
        claims = jwt.decode(assertion, signing, algorithms=["RS256"], audience=BOUND_AUDIENCE, issuer=ISSUER,
                            options={"require": ["exp", "iat", "nbf", "jti", "sub"]})
    except Exception as e:
        return say(login="refused", why=type(e).__name__)
    if claims["sub"] != BOUND_SUBJECT:
        return say(login="refused", why="sub")
    return claims


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body=None):
        text = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def serve(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        path, token = self.path.removeprefix("/v1/"), self.headers.get("X-Vault-Token")
        for lease in [l for l, (until, _) in leases.items() if until < time.time()]:
            drop(lease, "expired")
        if path in ("auth/approle/login", "auth/jwt/login"):
            right = {"role_id": ROLE_ID, "secret_id": SECRET_ID} if "approle" in path else {"role": "ci", "jwt": JWT}
            claims = None
            if ISSUER and "jwt" in path:
                claims = claims_of(body.get("jwt", ""))
                right = {**body, "role": "ci"} if claims else None
            if body != right:
                return self.answer(400, {"errors": ["invalid role or secret ID"]})
            fresh = "s." + secrets.token_urlsafe(18)
            tokens[fresh] = None
            say(login=path, claims=claims)
            return self.answer(200, {"auth": {"client_token": fresh, "accessor": "a", "entity_id": "entity-1",
                                              "lease_duration": 60, "renewable": True}})
        if token not in tokens or self.headers.get("X-Vault-Request") != "true":
            return self.answer(403, {"errors": ["permission denied"]})
        wrap = {"request_id": "request-1", "lease_id": "", "renewable": False, "lease_duration": 0}
        if path == "secret/data/app/key" and self.command == "GET":
            data = {"data": {"password": "kv-two-password-0123", "user": "app"}, "metadata": {"version": 3}}
            return self.answer(200, {**wrap, "data": data})
        if path == "secret/data/app/gone" and self.command == "GET":
            return self.answer(404, {**wrap, "data": {"data": None, "metadata": {"version": 3}}})
        if path == "database/creds/app" and self.command == "GET":
            lease = "database/creds/app/" + secrets.token_urlsafe(12)
            leases[lease] = (time.time() + LEASE, token)
            say(lease=lease, made=True)
            data = {"username": "v-app-" + secrets.token_hex(4), "password": "dynamic-" + secrets.token_hex(12)}
            return self.answer(200, {**wrap, "lease_id": lease, "lease_duration": int(LEASE), "renewable": True,
                                     "data": data})
        if path == "sys/leases/renew" and self.command in ("PUT", "POST"):
            lease = body["lease_id"]
            if lease not in leases:
                return self.answer(400, {"errors": ["lease not found"]})
            leases[lease] = (time.time() + LEASE, leases[lease][1])
            say(lease=lease, renewed=True)
            return self.answer(200, {**wrap, "lease_id": lease, "lease_duration": int(LEASE), "renewable": True,
                                     "data": None})
        if path == "sys/leases/revoke" and self.command in ("PUT", "POST"):
            if token != ROOT:
                return self.answer(403, {"errors": ["1 error occurred: permission denied"]})
            drop(body["lease_id"], "revoked")
            return self.answer(204)
        if path == "auth/token/renew-self":
            return self.answer(200, {"auth": {"client_token": token, "lease_duration": 60, "renewable": True}})
        if path == "auth/token/revoke-self":
            del tokens[token]
            for lease in [l for l, (_, of) in leases.items() if of == token]:
                drop(lease, "revoked")
            say(token="ended")
            return self.answer(204)
        self.answer(404, {"errors": []})

    do_GET = do_PUT = do_POST = serve


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
