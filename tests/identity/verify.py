"""Prints the claims of the token on standard input, verified by the published key set.

usage: verify.py DIR ISSUER AUDIENCE < token
"""
import json, sys
import jwt

directory, issuer, audience = sys.argv[1:4]
discovery = json.load(open(directory + "/.well-known/openid-configuration"))
assert discovery["issuer"] == issuer
keys = jwt.PyJWKSet.from_json(open(directory + "/.well-known/jwks.json").read())
token = sys.stdin.read().strip()
header = jwt.get_unverified_header(token)
key = next(key for key in keys.keys if key.key_id == header["kid"])
claims = jwt.decode(token, key, algorithms=["RS256"], audience=audience, issuer=issuer,
                    options={"require": ["exp", "iat", "nbf", "jti", "sub"]})
print(json.dumps({"header": header, "claims": claims}))
