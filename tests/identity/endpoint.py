"""The token endpoints of three clouds, on loopback over TLS, as far as their client libraries speak to them.

Each verifies the assertion with PyJWT, by the keys that the issuer's own discovery document leads to, and
writes what it found, or why it refused, as a JSON line to the log.

usage: endpoint.py ISSUER AUDIENCE CERT KEY LOG
"""
import datetime, http.server, json, ssl, sys, urllib.parse, urllib.request, uuid

import jwt

issuer, audience, cert, key, log = sys.argv[1:6]


def verify(assertion):
    with urllib.request.urlopen(issuer + "/.well-known/openid-configuration") as answer:
        discovery = json.load(answer)
    assert discovery["issuer"] == issuer, discovery
    keys = jwt.PyJWKClient(discovery["jwks_uri"])
    signing = keys.get_signing_key_from_jwt(assertion)
    return jwt.decode(
        assertion, signing, algorithms=discovery["id_token_signing_alg_values_supported"],
        audience=audience, issuer=issuer,
        options={"require": ["exp", "iat", "nbf", "jti", "sub"]},
    )


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
        if self.headers.get("content-type", "").startswith("application/json"):
            form = json.loads(body)
        else:
            form = dict(urllib.parse.parse_qsl(body))
        found = {"path": self.path, "form": {k: v for k, v in form.items() if len(str(v)) < 200}}
        assertion = form.get("client_assertion") or form.get("WebIdentityToken") or form.get("subject_token")
        try:
            found["claims"] = verify(assertion)
        except Exception as error:
            found["refused"] = f"{type(error).__name__}: {error}"
        with open(log, "a") as file:
            print(json.dumps(found), file=file, flush=True)
        if "refused" in found:
            return self.say(401, "application/json", json.dumps(
                {"error": "invalid_client", "error_description": "AADSTS: " + found["refused"]}))
        if form.get("Action") == "AssumeRoleWithWebIdentity":
            expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
            return self.say(200, "text/xml", f"""<AssumeRoleWithWebIdentityResponse
 xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
 <AssumedRoleUser><Arn>{form["RoleArn"]}/{form["RoleSessionName"]}</Arn><AssumedRoleId>A:x</AssumedRoleId></AssumedRoleUser>
 <Credentials><AccessKeyId>ASIAFRESHFRESHFRESH1</AccessKeyId><SecretAccessKey>fresh-secret-access-key-0123456789</SecretAccessKey>
 <SessionToken>fresh-session-token-0123456789</SessionToken><Expiration>{expires.strftime("%Y-%m-%dT%H:%M:%SZ")}</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult><ResponseMetadata><RequestId>{uuid.uuid4()}</RequestId></ResponseMetadata>
</AssumeRoleWithWebIdentityResponse>""")
        token = {"access_token": "cloud-access-token", "token_type": "Bearer", "expires_in": 3599,
                 "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}
        self.say(200, "application/json", json.dumps(token))

    def say(self, status, kind, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(cert, key)
server.socket = tls.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
