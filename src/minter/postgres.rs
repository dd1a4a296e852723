//! Roles of a PostgreSQL server, made for a lease: `CREATE ROLE` with a random password and `VALID UNTIL`, a
//! member of what the source grants; dropped with its sessions and what it owns. The frontend/backend protocol
//! (PostgreSQL 10 and later), as far as that takes it: start-up, SCRAM-SHA-256 (RFC 5802, 7677), simple queries.
//!
//! The server is never told the new password, nor its own administrator's: it is proved, or sent as a verifier.
#![forbid(unsafe_code)]

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::http::{Http, Stream};
use super::{Minted, Outcome, handle};
use crate::config::source::PostgresRole;
use crate::model::mint::{About, Facts, Failure, Fault, Operation, Request, Role};

/// The largest message that is taken, and how many of one answer.
const MAX_MESSAGE: usize = 64 << 10;
const MAX_MESSAGES: usize = 1000;
/// PostgreSQL's own, and the most that a server may make us count.
const ITERATIONS: u32 = 4096;
const MAX_ITERATIONS: u32 = 1_000_000;

pub fn answer(
    source: &PostgresRole,
    http: &Http,
    request: &Request<'_>,
) -> Result<Outcome, Failure> {
    let password = request.credential(Role::Password).ok_or(Failure::of(Fault::Credential))?;
    // RFC 4013 leaves ASCII as it is; other text would have to be prepared.
    if password.is_empty() || !password.iter().all(u8::is_ascii_graphic) {
        return Err(Failure::of(Fault::Credential));
    }
    let facts = &request.facts;
    http.converse(&source.server, &SSL_REQUEST, b'S', async |stream| {
        let mut session = Session { stream };
        session.start(source, password, facts).await?;
        let outcome = match request.operation {
            Operation::Mint => mint(&mut session, source, facts).await.map(Outcome::Minted),
            Operation::Renew => renew(&mut session, role_of(request)?, facts).await,
            Operation::Revoke => {
                drop_role(&mut session, source, role_of(request)?).await.map(|()| Outcome::Revoked)
            }
        };
        session.end().await;
        outcome
    })
}

/// `SSLRequest`: its length and its number.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

async fn mint(
    session: &mut Session<'_>,
    source: &PostgresRole,
    facts: &Facts,
) -> Result<Minted, Failure> {
    let random = |size: usize| -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; size];
        crate::sys::random::fill(&mut bytes).map_err(|_| Failure::of(Fault::Minter))?;
        Ok(bytes)
    };
    let password = URL_SAFE_NO_PAD.encode(random(24)?);
    // Readable in the server's own log, and another for each exec of the lease.
    let unique: String = random(4)?.iter().map(|b| format!("{b:02x}")).collect();
    let lease: String = facts.lease_id.chars().filter(char::is_ascii_alphanumeric).collect();
    let role = format!("sublet_{lease}_{unique}");
    if role.len() > 63 || !is_ours(&role) {
        return Err(Failure::of(Fault::Minter));
    }
    let verifier = verifier(password.as_bytes(), &random(16)?);
    let until = valid_until(facts)?;
    let grants: Vec<String> = source.grants.iter().map(|grant| format!("\"{grant}\"")).collect();
    session
        .query(&format!(
            "CREATE ROLE \"{role}\" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS \
             INHERIT PASSWORD '{verifier}' VALID UNTIL '{until}' IN ROLE {}",
            grants.join(", ")
        ))
        .await?;
    let server = source.server.authority();
    let host = match source.server.port {
        443 if source.server.tls => format!("{server}:443"),
        80 if !source.server.tls => format!("{server}:80"),
        _ => server,
    };
    let mode = if source.server.tls { "verify-full" } else { "disable" };
    // `sslrootcert` is the client's own business: `system` since libpq 16, else ~/.postgresql/root.crt.
    let uri = format!("postgresql://{role}:{password}@{host}/{}?sslmode={mode}", source.database);
    Ok(Minted {
        value: uri.into_bytes(),
        parts: vec![
            ("username", false, role.clone().into_bytes()),
            ("password", true, password.into_bytes()),
        ],
        about: About {
            issuer: format!("postgresql://{host}/{}", source.database),
            scope: Some(source.grants.join(",")),
            principal: Some(role.clone()),
            far_id: Some(role.clone()),
            expires_at: Some(super::seconds_from(facts, ttl(facts))),
            renew_at: None,
        },
        handle: Some(role.into_bytes()),
    })
}

async fn renew(session: &mut Session<'_>, role: &str, facts: &Facts) -> Result<Outcome, Failure> {
    let until = valid_until(facts)?;
    session.query(&format!("ALTER ROLE \"{role}\" VALID UNTIL '{until}'")).await?;
    let expires_at = Some(super::seconds_from(facts, ttl(facts)));
    Ok(Outcome::Renewed(About { expires_at, ..About::default() }))
}

/// No new login; its sessions ended; what it owns given away or dropped; the role itself. In this order, so
/// that each step holds for what comes. One that is gone already is gone.
async fn drop_role(
    session: &mut Session<'_>,
    source: &PostgresRole,
    role: &str,
) -> Result<(), Failure> {
    let oid = format!("SELECT oid FROM pg_catalog.pg_roles WHERE rolname = '{role}'");
    let Some(oid) = session.query(&oid).await? else { return Ok(()) };
    if oid.is_empty() || !oid.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Failure::of(Fault::Incomplete));
    }
    let end = format!(
        "SELECT count(pg_catalog.pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity \
         WHERE usesysid = {oid} AND pid <> pg_catalog.pg_backend_pid()"
    );
    // Without its membership nobody but a superuser may end its sessions or take what it owns.
    session
        .query(&format!("ALTER ROLE \"{role}\" NOLOGIN; GRANT \"{role}\" TO CURRENT_USER"))
        .await?;
    session.query(&end).await?;
    let reassign = source.reassign_to.as_ref();
    let reassign = reassign.map(|to| format!("REASSIGN OWNED BY \"{role}\" TO \"{to}\"; "));
    session
        .query(&format!(
            "{}DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\"",
            reassign.unwrap_or_default()
        ))
        .await?;
    // One that was logging in while logins were shut.
    session.query(&end).await.map(drop)
}

fn role_of<'a>(request: &Request<'a>) -> Result<&'a str, Failure> {
    let name = std::str::from_utf8(handle(request)?).ok().filter(|name| is_ours(name));
    name.ok_or(Failure::of(Fault::Minter))
}

/// Whatever the handle is: no role that was there before is dropped.
fn is_ours(role: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    role.len() <= 63 && role.starts_with("sublet_lse") && role.bytes().all(plain)
}

fn ttl(facts: &Facts) -> i64 {
    i64::try_from(facts.ttl_seconds).unwrap_or(i64::MAX)
}

fn valid_until(facts: &Facts) -> Result<String, Failure> {
    let at = facts.now.saturating_add(ttl(facts));
    let at = jiff::Timestamp::from_second(at).map_err(|_| Failure::of(Fault::Minter))?;
    Ok(format!("{at:.0}"))
}

/// Sends the response to a challenge and knows what must come back.
struct Scram {
    nonce: String,
}

/// What the client says last, and the signature that the server must then give.
struct Proof {
    message: String,
    server_signature: Vec<u8>,
}

impl Scram {
    fn new() -> Result<Self, Failure> {
        let mut nonce = [0; 18];
        crate::sys::random::fill(&mut nonce).map_err(|_| Failure::of(Fault::Minter))?;
        Ok(Self { nonce: STANDARD.encode(nonce) })
    }

    fn first_bare(&self) -> String {
        // The user's name is the start-up message's; PostgreSQL ignores this one.
        format!("n=,r={}", self.nonce)
    }

    fn prove(&self, challenge: &str, password: &[u8]) -> Option<Proof> {
        let mut parts = challenge.split(',');
        let nonce = parts.next()?.strip_prefix("r=")?;
        let salt = STANDARD.decode(parts.next()?.strip_prefix("s=")?).ok()?;
        let count: u32 = parts.next()?.strip_prefix("i=")?.parse().ok()?;
        // A server that repeats what we said, or wants next to no work, is none that knows the password.
        if !nonce.starts_with(&self.nonce)
            || nonce.len() == self.nonce.len()
            || !(ITERATIONS..=MAX_ITERATIONS).contains(&count)
        {
            return None;
        }
        let keys = Keys::derive(password, &salt, count);
        let bare = format!("c=biws,r={nonce}");
        let signed = format!("{},{challenge},{bare}", self.first_bare());
        let client_signature = mac(&keys.stored, signed.as_bytes());
        let proof: Vec<u8> =
            keys.client.iter().zip(&client_signature).map(|(a, b)| a ^ b).collect();
        Some(Proof {
            message: format!("{bare},p={}", STANDARD.encode(proof)),
            server_signature: mac(&keys.server, signed.as_bytes()),
        })
    }
}

struct Keys {
    client: Vec<u8>,
    stored: Vec<u8>,
    server: Vec<u8>,
}

impl Keys {
    fn derive(password: &[u8], salt: &[u8], count: u32) -> Self {
        let mut salted = [0; 32];
        let count = std::num::NonZeroU32::new(count).unwrap_or(std::num::NonZeroU32::MIN);
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, count, salt, password, &mut salted);
        let client = mac(&salted, b"Client Key");
        let stored = digest::digest(&digest::SHA256, &client).as_ref().to_vec();
        Self { server: mac(&salted, b"Server Key"), stored, client }
    }
}

/// As PostgreSQL keeps a password: it takes this in its place.
fn verifier(password: &[u8], salt: &[u8]) -> String {
    let keys = Keys::derive(password, salt, ITERATIONS);
    let [salt, stored, server] = [salt, &keys.stored, &keys.server].map(|b| STANDARD.encode(b));
    format!("SCRAM-SHA-256${ITERATIONS}:{salt}${stored}:{server}")
}

fn mac(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

struct Session<'a> {
    stream: &'a mut dyn Stream,
}

impl Session<'_> {
    async fn start(
        &mut self,
        source: &PostgresRole,
        password: &[u8],
        facts: &Facts,
    ) -> Result<(), Failure> {
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        let name = format!("sublet {}", facts.lease_id);
        for (key, value) in [
            ("user", source.user.as_str()),
            ("database", source.database.as_str()),
            ("application_name", name.as_str()),
        ] {
            body.extend([key.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
        }
        body.push(0);
        self.send(None, &body).await?;
        let scram = Scram::new()?;
        let mut proof: Option<Proof> = None;
        for _ in 0..MAX_MESSAGES {
            let (kind, body) = self.receive().await?;
            match (kind, body.first_chunk().map(|code| u32::from_be_bytes(*code))) {
                // Of a server that asks for no password: TLS or this machine itself says who it is.
                (b'R', Some(0)) => {}
                (b'R', Some(10)) => {
                    let mechanisms = &body[4..];
                    if !mechanisms.split(|b| *b == 0).any(|m| m == b"SCRAM-SHA-256") {
                        return Err(Failure::of(Fault::Refused));
                    }
                    let first = format!("n,,{}", scram.first_bare());
                    let mut answer = b"SCRAM-SHA-256\0".to_vec();
                    answer.extend((first.len() as u32).to_be_bytes());
                    answer.extend(first.as_bytes());
                    self.send(Some(b'p'), &answer).await?;
                }
                (b'R', Some(11)) if proof.is_none() => {
                    let challenge = std::str::from_utf8(&body[4..]).ok();
                    let proved = challenge.and_then(|c| scram.prove(c, password));
                    let proved = proved.ok_or(Failure::of(Fault::Refused))?;
                    self.send(Some(b'p'), proved.message.as_bytes()).await?;
                    proof = Some(proved);
                }
                (b'R', Some(12)) => {
                    let given = body[4..].strip_prefix(b"v=").and_then(|v| STANDARD.decode(v).ok());
                    let expected = proof.take().map(|proof| proof.server_signature);
                    // Who does not know the password either is another server.
                    if given.is_none() || given != expected {
                        return Err(Failure::of(Fault::Untrusted));
                    }
                }
                // A password in the clear, or as MD5: not sent.
                (b'R', _) => return Err(Failure::of(Fault::Refused)),
                (b'E', _) => return Err(refusal(&body)),
                (b'Z', _) if proof.is_none() => return Ok(()),
                (b'S' | b'K' | b'N', _) => {}
                _ => return Err(Failure::of(Fault::Incomplete)),
            }
        }
        Err(Failure::of(Fault::TooLarge))
    }

    /// Runs it as one transaction; gives the first column of its first row, if there is one.
    async fn query(&mut self, text: &str) -> Result<Option<String>, Failure> {
        let mut body = text.as_bytes().to_vec();
        body.push(0);
        self.send(Some(b'Q'), &body).await?;
        let (mut first, mut failed) = (None, None);
        for _ in 0..MAX_MESSAGES {
            let (kind, body) = self.receive().await?;
            match kind {
                b'D' if first.is_none() => first = column(&body),
                b'E' => failed = failed.or(Some(refusal(&body))),
                b'Z' => return failed.map_or(Ok(first), Err),
                b'D' | b'T' | b'C' | b'I' | b'N' | b'S' | b'A' => {}
                _ => return Err(Failure::of(Fault::Incomplete)),
            }
        }
        Err(Failure::of(Fault::TooLarge))
    }

    /// `Terminate`. The work is done: what becomes of the connection changes nothing.
    async fn end(&mut self) {
        drop(self.send(Some(b'X'), &[]).await);
    }

    async fn send(&mut self, kind: Option<u8>, body: &[u8]) -> Result<(), Failure> {
        let mut message: Vec<u8> = kind.into_iter().collect();
        message.extend((body.len() as u32 + 4).to_be_bytes());
        message.extend_from_slice(body);
        let gone = |_| Failure::of(Fault::NoAnswer);
        self.stream.write_all(&message).await.map_err(gone)?;
        self.stream.flush().await.map_err(gone)
    }

    async fn receive(&mut self) -> Result<(u8, Vec<u8>), Failure> {
        let gone = |_| Failure::of(Fault::NoAnswer);
        let mut head = [0; 5];
        self.stream.read_exact(&mut head).await.map_err(gone)?;
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if !(4..=MAX_MESSAGE).contains(&len) {
            return Err(Failure::of(Fault::TooLarge));
        }
        let mut body = vec![0; len - 4];
        self.stream.read_exact(&mut body).await.map_err(gone)?;
        Ok((head[0], body))
    }
}

/// The first column of a `DataRow`; nothing for NULL.
fn column(body: &[u8]) -> Option<String> {
    let len = i32::from_be_bytes(*body.get(2..)?.first_chunk()?);
    let text = body.get(6..)?.get(..usize::try_from(len).ok()?)?;
    String::from_utf8(text.to_vec()).ok()
}

/// An `ErrorResponse`: its SQLSTATE alone. The words may quote a statement.
fn refusal(body: &[u8]) -> Failure {
    let fields = body.split(|b| *b == 0).filter_map(|field| field.split_first());
    let state = fields.filter(|(kind, _)| **kind == b'C').map(|(_, text)| text).next();
    let code = state.filter(|code| code.len() == 5 && code.iter().all(u8::is_ascii_alphanumeric));
    let code = code.map(|code| String::from_utf8_lossy(code).into_owned());
    // Class 53: insufficient resources; 57: an operator intervened, the server starts or stops.
    let is_broken = code.as_deref().is_some_and(|c| c.starts_with("53") || c.starts_with("57"));
    let fault = if is_broken { Fault::Broken } else { Fault::Refused };
    Failure { code, ..Failure::of(fault) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7677 §3.
    #[test]
    fn the_proof_is_that_of_the_example() {
        let keys =
            Keys::derive(b"pencil", &STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap(), 4096);
        let signed = "n=user,r=rOprNGfwEbeRWgbNEkqO,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                      s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,\
                      c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let signature = mac(&keys.stored, signed.as_bytes());
        let proof: Vec<u8> = keys.client.iter().zip(&signature).map(|(a, b)| a ^ b).collect();
        assert_eq!(STANDARD.encode(proof), "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
        let server = mac(&keys.server, signed.as_bytes());
        assert_eq!(STANDARD.encode(server), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    #[test]
    fn a_server_that_makes_it_easy_is_refused() {
        let scram = Scram { nonce: "abc".into() };
        let prove = |challenge: &str| scram.prove(challenge, b"x").is_some();
        assert!(prove("r=abcdef,s=AAAA,i=4096"));
        for bad in [
            "r=abc,s=AAAA,i=4096",
            "r=xyzdef,s=AAAA,i=4096",
            "r=abcdef,s=AAAA,i=1",
            "r=abcdef,s=AAAA,i=99999999",
            "r=abcdef,s=*,i=4096",
            "m=x,r=abcdef,s=AAAA,i=4096",
            "",
        ] {
            assert!(!prove(bad), "{bad}");
        }
    }

    #[test]
    fn only_roles_of_our_own_are_dropped() {
        assert!(is_ours("sublet_lse01a21deb04e076e7b221e89f6db70113_00c0ffee"));
        for other in ["postgres", "sublet_lse\"; DROP", "sublet_admin", "", "sublet_lse'x"] {
            assert!(!is_ours(other), "{other}");
        }
    }

    #[test]
    fn of_an_error_the_state_is_told_and_no_word() {
        let failure = refusal(b"SERROR\0C28P01\0Mpassword hunter2 failed\0\0");
        assert_eq!((failure.fault, failure.code.as_deref()), (Fault::Refused, Some("28P01")));
        assert!(!failure.to_string().contains("hunter2"));
        assert_eq!(refusal(b"SFATAL\0C57P03\0\0").fault, Fault::Broken);
        assert_eq!(refusal(b"Cx\"; --\0").code, None);
    }
}
