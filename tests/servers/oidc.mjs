// A real authorization server, `oidc-provider`, for one test: client credentials with resource indicators
// (RFC 8707), token revocation (RFC 7009), token introspection (RFC 7662). Prints its port, then what it
// did as lines of JSON. Run where node_modules has it.
import { createServer } from 'node:http';
import { Provider } from 'oidc-provider';

const say = (what) => console.log(JSON.stringify(what));
const server = createServer().listen(0, '127.0.0.1', () => {
  const { port } = server.address();
  const provider = new Provider(`http://127.0.0.1:${port}`, {
    clients: [{
      client_id: 'sublet', client_secret: 'client-secret-0123456789',
      grant_types: ['client_credentials'], redirect_uris: [], response_types: [],
    }, {
      client_id: 'poster', client_secret: 'client-secret-0123456789', token_endpoint_auth_method: 'client_secret_post',
      grant_types: ['client_credentials'], redirect_uris: [], response_types: [],
    }],
    scopes: ['read', 'write', 'admin'],
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      revocation: { enabled: true },
      introspection: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: (_, resource) => ({
          scope: 'read write', audience: resource, accessTokenTTL: 120,
          accessTokenFormat: resource.includes('jwt') ? 'jwt' : 'opaque',
        }),
      },
    },
  });
  provider.on('client_credentials.issued', (token) => say({ issued: token.jti, scope: token.scope, aud: token.aud }));
  provider.on('client_credentials.destroyed', (token) => say({ revoked: token.jti }));
  provider.on('grant.error', (_, error) => say({ error: error.message }));
  server.on('request', provider.callback());
  console.log(port);
});
