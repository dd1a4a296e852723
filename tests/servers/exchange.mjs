// A real authorization server, `oidc-provider`, with a token exchange (RFC 8693) as one registers it there:
// it takes assertions of one issuer, whose keys it finds by that issuer's discovery document and checks
// with `jose`, and issues a token that says who acts for whom (`act`), for which resource (RFC 8707), what
// in detail (RFC 9396), which it introspects (RFC 7662) and revokes (RFC 7009).
//
// Argument: the issuer whose assertions it takes. Prints its port, then what it did as lines of JSON. Run
// where node_modules has both.
import { createServer } from 'node:http';
import { createRemoteJWKSet, jwtVerify } from 'jose';
import { Provider, errors } from 'oidc-provider';

const issuer = process.argv[2];
const GRANT = 'urn:ietf:params:oauth:grant-type:token-exchange';
const JWT = 'urn:ietf:params:oauth:token-type:jwt';
const ACCESS_TOKEN = 'urn:ietf:params:oauth:token-type:access_token';
const say = (what) => console.log(JSON.stringify(what));
const list = (value) => [value ?? []].flat();
const apiOf = (resource) => ({
  scope: 'invoices:read invoices:write', audience: resource, accessTokenTTL: 120, accessTokenFormat: 'opaque',
});

const server = createServer().listen(0, '127.0.0.1', () => {
  const url = `http://127.0.0.1:${server.address().port}`;
  const secret = 'client-secret-0123456789';
  const client = { redirect_uris: [], response_types: [], client_secret: secret };
  const provider = new Provider(url, {
    clients: [
      { ...client, client_id: 'sublet', grant_types: [GRANT], authorization_details_types: ['invoice'] },
      // Who serves the resource, and asks what a token is good for.
      { ...client, client_id: 'api', grant_types: [] },
    ],
    scopes: ['invoices:read', 'invoices:write'],
    extraTokenClaims: (ctx) => ctx?.oidc.exchanged,
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      revocation: { enabled: true },
      introspection: { enabled: true, allowedPolicy: (_, who) => who.clientId === 'api' },
      resourceIndicators: { enabled: true, getResourceServerInfo: (_, resource) => apiOf(resource) },
      richAuthorizationRequests: {
        enabled: true,
        types: {
          invoice: {
            validate: (_, detail) => {
              if (!list(detail.actions).every((action) => action === 'read')) {
                throw new errors.InvalidAuthorizationDetails('no such action');
              }
            },
          },
        },
        authorizationDetailsForIntrospection: (_, token) => token.rar,
      },
    },
  });

  async function verified(params, which) {
    if (params[`${which}_type`] !== JWT) throw new errors.InvalidRequest(`${which}_type`);
    const discovery = await (await fetch(`${issuer}/.well-known/openid-configuration`)).json();
    const keys = createRemoteJWKSet(new URL(discovery.jwks_uri));
    try {
      const options = { issuer: discovery.issuer, audience: url, algorithms: ['RS256'] };
      return (await jwtVerify(params[which], keys, options)).payload;
    } catch (e) {
      throw new errors.InvalidGrant(`${which}: ${e.code}`);
    }
  }

  async function exchange(ctx) {
    const { params, client: by } = ctx.oidc;
    const subject = await verified(params, 'subject_token');
    const actor = await verified(params, 'actor_token');
    const [resource, ...others] = list(params.resource);
    if (!resource?.startsWith('https://billing.test/') || others.length) throw new errors.InvalidTarget();
    const scopes = (params.scope ?? '').split(' ').filter(Boolean);
    if (!scopes.every((scope) => apiOf(resource).scope.split(' ').includes(scope))) {
      throw new errors.InvalidScope('not of this resource', params.scope);
    }
    const details = params.authorization_details && JSON.parse(params.authorization_details);
    ctx.oidc.exchanged = { sub: subject.sub, act: { sub: actor.sub, iss: actor.iss } };
    const token = new provider.ClientCredentials({ client: by, scope: scopes.join(' ') || undefined });
    token.resourceServer = new provider.ResourceServer(resource, apiOf(resource));
    token.rar = details;
    const value = await token.save();
    say({
      exchanged: token.jti, client: by.clientId, subject, actor, resource, audience: list(params.audience),
      scope: params.scope, details, request_id: ctx.get('x-request-id'),
    });
    ctx.body = {
      access_token: value, issued_token_type: ACCESS_TOKEN, token_type: 'Bearer', expires_in: token.expiration,
      scope: token.scope, authorization_details: details,
    };
  }

  const params = ['subject_token', 'subject_token_type', 'actor_token', 'actor_token_type', 'requested_token_type',
    'scope', 'resource', 'audience', 'authorization_details'];
  provider.registerGrantType(GRANT, exchange, params, ['resource', 'audience']);
  provider.on('client_credentials.destroyed', (token) => say({ revoked: token.jti }));
  provider.on('grant.error', (_, error) => say({ error: error.error, why: error.error_description }));
  server.on('request', provider.callback());
  console.log(server.address().port);
});
