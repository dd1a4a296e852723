//! One call over a connection of its own: HTTP/1.1, over TLS but to this machine itself. Speaks only to hosts
//! that the settings name; follows no redirect; takes bounded answers in bounded time; says of a failure the
//! host, the status and a word of ours.
#![forbid(unsafe_code)]

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{self, HeaderValue};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::tls;
use crate::config::Minted;
use crate::config::source::HttpUrl;
use crate::model::mint::{Facts, Failure, Fault};

/// The largest answer that is taken.
const MOST: usize = 192 << 10;
/// One address that swallows packets must not use up the time of the next.
const CONNECT: Duration = Duration::from_secs(4);
/// Kept of the deadline for telling how it ended.
const MARGIN: Duration = Duration::from_millis(300);

pub struct Http {
    runtime: tokio::runtime::Runtime,
    tls: Option<Arc<ClientConfig>>,
    /// The only ones that are spoken to.
    known: Vec<HttpUrl>,
    until: Instant,
    /// In every call, for the far side's log.
    request_id: HeaderValue,
}

/// A connection, with or without TLS.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

pub struct Call<'a> {
    pub method: Method,
    pub url: &'a HttpUrl,
    /// Beside `Host`, `User-Agent`, `Accept` and `X-Request-Id`.
    pub headers: Vec<(header::HeaderName, HeaderValue)>,
    pub body: Vec<u8>,
}

pub struct Answered {
    pub status: StatusCode,
    pub body: Vec<u8>,
    /// Its bytes after the status line were of this type.
    host: String,
}

impl Http {
    pub fn new(source: &Minted, pem: Option<Vec<u8>>, facts: &Facts) -> Result<Self, Failure> {
        let known: Vec<HttpUrl> = source.kind.urls().into_iter().cloned().collect();
        let tls = match known.iter().any(|url| url.tls) {
            true => Some(tls::config(pem.as_deref())?),
            false => None,
        };
        // No thread: names are looked up here, before.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|_| Failure::of(Fault::Minter))?;
        let until = Instant::now() + source.timeout.saturating_sub(MARGIN).max(source.timeout / 2);
        let request_id =
            HeaderValue::from_str(&facts.lease_id).map_err(|_| Failure::of(Fault::Minter))?;
        Ok(Self { runtime, tls, known, until, request_id })
    }

    /// # Errors
    /// There is no whole answer, or it is a redirect. Any other status is the caller's to judge.
    pub fn call(&self, call: Call<'_>) -> Result<Answered, Failure> {
        let host = call.url.authority();
        let failed = |fault| Failure { host: Some(host.clone()), ..Failure::of(fault) };
        if !self.known.iter().any(|known| known.is_same_origin(call.url)) {
            return Err(failed(Fault::Settings));
        }
        let addresses: Vec<SocketAddr> = (call.url.host.as_str(), call.url.port)
            .to_socket_addrs()
            .map(Iterator::collect)
            .map_err(|_| failed(Fault::Unresolved))?;
        if addresses.is_empty() {
            return Err(failed(Fault::Unresolved));
        }
        let spoken = self.runtime.block_on(async {
            match timeout_at(self.until, self.speak(call, &addresses)).await {
                Ok(spoken) => spoken.map_err(|fault| (fault, None)),
                Err(_) => Err((Fault::TooSlow, None)),
            }
        });
        let (status, body) =
            spoken.map_err(|(fault, status)| Failure { status, ..failed(fault) })?;
        let answered = Answered { status, body, host: host.clone() };
        if status.is_redirection() {
            return Err(answered.failure(Fault::Redirected));
        }
        Ok(answered)
    }

    /// Another protocol than HTTP, over one connection. Where TLS is spoken, it begins after the server has
    /// answered `request` with `consent`, as PostgreSQL has it.
    ///
    /// # Errors
    /// There is no connection, or what `act` says; each with the host.
    pub fn converse<T>(
        &self,
        url: &HttpUrl,
        request: &[u8],
        consent: u8,
        act: impl AsyncFnOnce(&mut dyn Stream) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let host = url.authority();
        let at_host = |failure: Failure| Failure { host: Some(host.clone()), ..failure };
        let failed = |fault| at_host(Failure::of(fault));
        if !self.known.iter().any(|known| known.is_same_origin(url)) {
            return Err(failed(Fault::Settings));
        }
        let addresses = (url.host.as_str(), url.port).to_socket_addrs();
        let addresses: Vec<SocketAddr> =
            addresses.map_err(|_| failed(Fault::Unresolved))?.collect();
        self.runtime.block_on(async {
            let conversation = async {
                let mut stream = connect(&addresses).await.map_err(failed)?;
                if !url.tls {
                    return act(&mut stream).await.map_err(at_host);
                }
                let mut answer = [0];
                let asked = async {
                    stream.write_all(request).await?;
                    stream.read_exact(&mut answer).await
                };
                asked.await.map_err(|_| failed(Fault::NoAnswer))?;
                if answer != [consent] {
                    return Err(failed(Fault::Tls));
                }
                let mut stream = self.secure(url, stream).await.map_err(failed)?;
                act(&mut stream).await.map_err(at_host)
            };
            match timeout_at(self.until, conversation).await {
                Ok(outcome) => outcome,
                Err(_) => Err(failed(Fault::TooSlow)),
            }
        })
    }

    async fn secure(
        &self,
        url: &HttpUrl,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, Fault> {
        let name = ServerName::try_from(url.host.clone()).map_err(|_| Fault::Unresolved)?;
        let config = self.tls.clone().ok_or(Fault::CaFile)?;
        TlsConnector::from(config).connect(name, stream).await.map_err(|e| {
            let of_tls = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
            match of_tls {
                Some(rustls::Error::InvalidCertificate(_)) => Fault::Untrusted,
                Some(_) => Fault::Tls,
                None => Fault::NoAnswer,
            }
        })
    }

    async fn speak(
        &self,
        call: Call<'_>,
        addresses: &[SocketAddr],
    ) -> Result<(StatusCode, Vec<u8>), Fault> {
        let stream = connect(addresses).await?;
        if !call.url.tls {
            return exchange(stream, self.request(call)?).await;
        }
        let stream = self.secure(call.url, stream).await?;
        exchange(stream, self.request(call)?).await
    }

    fn request(&self, call: Call<'_>) -> Result<hyper::Request<Full<Bytes>>, Fault> {
        let mut request = hyper::Request::builder()
            .method(call.method)
            .uri(&call.url.path)
            .header(header::HOST, call.url.authority())
            .header(header::USER_AGENT, concat!("sublet/", env!("CARGO_PKG_VERSION")))
            .header("x-request-id", self.request_id.clone());
        let mut accepts = false;
        for (name, mut value) in call.headers {
            accepts |= name == header::ACCEPT;
            value.set_sensitive(true);
            request = request.header(name, value);
        }
        if !accepts {
            request = request.header(header::ACCEPT, "application/json");
        }
        request.body(Full::new(Bytes::from(call.body))).map_err(|_| Fault::Settings)
    }
}

impl Answered {
    pub fn failure(&self, fault: Fault) -> Failure {
        Failure {
            fault,
            host: Some(self.host.clone()),
            status: Some(self.status.as_u16()),
            code: None,
        }
    }

    /// What a status that is no success comes to.
    pub fn refusal(&self) -> Failure {
        let fault = match self.status.is_server_error() {
            true => Fault::Broken,
            false => Fault::Refused,
        };
        self.failure(fault)
    }

    /// The answer as a JSON object of this form.
    ///
    /// # Errors
    /// It is none. The parser's own words are not told: they may quote a value.
    pub fn json<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, Failure> {
        let is_object = self.body.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
        if !is_object {
            return Err(self.failure(Fault::NotJson));
        }
        serde_json::from_slice(&self.body).map_err(|e| {
            let fault = match e.is_data() {
                true => Fault::Incomplete,
                false => Fault::NotJson,
            };
            self.failure(fault)
        })
    }
}

async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, Fault> {
    let mut last = Fault::Unreachable;
    for address in addresses {
        match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(_)) => {}
            Err(_) => last = Fault::TooSlow,
        }
    }
    Err(last)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: hyper::Request<Full<Bytes>>,
) -> Result<(StatusCode, Vec<u8>), Fault> {
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MOST)
        .max_headers(100)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Fault::NoAnswer)?;
    let answer = async {
        let answer = sender.send_request(request).await.map_err(|_| Fault::NoAnswer)?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, MOST).collect().await.map_err(|e| {
            match e.is::<http_body_util::LengthLimitError>() {
                true => Fault::TooLarge,
                false => Fault::NoAnswer,
            }
        })?;
        Ok((head.status, body.to_bytes().to_vec()))
    };
    // The connection does the work; it may end before the answer is taken from it, or go on after.
    tokio::pin!(answer);
    tokio::pin!(connection);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        _ = &mut connection => answer.await,
    }
}
