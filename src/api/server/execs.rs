//! Execs: begun, as a stream of frames or in one answer; shown.
//!
//! An exec is a thread of the broker that speaks frames on a Unix socket. With an upgrade that socket is
//! the client's own, on which the exec says even the 101; without one it is a pair of which this file holds
//! the other end, and lets go of it when the client does: the exec then dies.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use axum::extract::State;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderMap, HeaderName, StatusCode, Version};
use axum::response::IntoResponse;
use serde::Serialize;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tracing::Span;

use crate::api::server::ask::{Answer, Id, Json, Query, json_answer};
use crate::api::server::connection::Asker;
use crate::api::server::leases::Narrowed;
use crate::api::server::refusal::Refusal;
use crate::api::server::routes::Shared;
use crate::api::server::runs::own_run;
use crate::api::wire::{self, ErrorBody, ExecAnswer, ExecBody};
use crate::broker::streams::ClientStream;
use crate::broker::{Accepting, ExecAsk, ExecView};
use crate::launcher::into::InContainer;
use crate::model::id::ExecId;
use crate::relay::frames::{self, Kind};

/// Bytes of each of stdout and stderr in one answer.
const MOST_OUTPUT: usize = 1 << 20;
/// Bytes of a report or an error.
const MOST_WORDS: usize = 4 << 20;

#[derive(Serialize)]
struct Execs {
    execs: Vec<ExecView>,
}

pub(super) async fn list(
    State(app): State<Shared>,
    asker: Asker,
    Query(narrowed): Query<Narrowed>,
) -> Answer {
    let scope = narrowed.scope(&asker)?;
    let work = move || app.broker.execs(&scope).map(|execs| Execs { execs });
    asker.reply(StatusCode::OK, work).await
}

pub(super) async fn show(State(app): State<Shared>, asker: Asker, Id(exec): Id<ExecId>) -> Answer {
    let scope = asker.scope().clone();
    asker.reply(StatusCode::OK, move || app.broker.exec_of(&scope, &exec)).await
}

pub(super) async fn start(
    State(app): State<Shared>,
    asker: Asker,
    version: Version,
    headers: HeaderMap,
    Json(body): Json<ExecBody>,
) -> Answer {
    let run = own_run(&asker)?;
    let is_stream = wants_stream(version, &headers)?;
    let ask = ask(body, &asker)?;
    let exec_id = ExecId::fresh();
    Span::current().record("exec_id", tracing::field::display(&exec_id));
    let (client, ours) = if is_stream {
        (own_stream(&asker, &exec_id)?, None)
    } else {
        let (client, ours) = stream_pair()?;
        (client, Some(ours))
    };
    let Accepting { accepted, read_ahead } = app.broker.exec(&run, exec_id.clone(), ask, client)?;
    // From here on the exec is one of the run's execs, which the broker bounds.
    asker.leave_place();
    accepted.await.map_err(|_| lost())??;
    match ours {
        None => {
            asker.line.upgrade_to(read_ahead);
            // The client has heard it already: this goes no further than the line.
            Ok(StatusCode::SWITCHING_PROTOCOLS.into_response())
        }
        Some(ours) => {
            read_ahead.give(Vec::new());
            to_its_end(exec_id, ours).await
        }
    }
}

/// The client's own connection. The exec greets it with the 101 itself, as soon as it may, and does not wait for
/// this task to come to it.
fn own_stream(asker: &Asker, exec_id: &ExecId) -> Result<ClientStream, Refusal> {
    let greeting = format!(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {}\r\n\
         sublet-exec-id: {exec_id}\r\n\r\n",
        wire::UPGRADE
    );
    let line = asker.line.clone();
    Ok(ClientStream {
        socket: line.copy().map_err(broken)?,
        greeting: greeting.into_bytes(),
        taken: Box::new(move || line.take()),
    })
}

/// A connection whose client is this task.
fn stream_pair() -> Result<(ClientStream, UnixStream), Refusal> {
    let (ours, theirs) = UnixStream::pair().map_err(broken)?;
    ours.set_nonblocking(true).and_then(|()| theirs.set_nonblocking(true)).map_err(broken)?;
    // Standard input is at its end before it begins. Eight bytes fit into an empty socket.
    (&ours).write_all(&frames::header(Kind::Stdin, 0)).map_err(broken)?;
    Ok((ClientStream { socket: theirs, greeting: Vec::new(), taken: Box::new(|| ()) }, ours))
}

fn ask(body: ExecBody, asker: &Asker) -> Result<ExecAsk, Refusal> {
    let ExecBody { lease_ids, command, environment, timeout, terminal, network, .. } = body;
    let (reason, user, directory) = (body.reason, body.user, body.workdir);
    if command.is_empty() {
        return Err(Refusal::malformed("body: `command` is empty"));
    }
    let process = asker.caller.peer.process.as_ref().map(std::os::fd::OwnedFd::try_clone);
    let caller = process
        .transpose()
        .map_err(|e| Refusal::internal(format!("could not keep the caller's descriptor: {e}")))?;
    Ok(ExecAsk {
        lease_ids,
        command: command.into_iter().map(Into::into).collect(),
        environment: environment.into_iter().map(|(name, value)| (name, value.into())).collect(),
        timeout,
        terminal: terminal.map(|t| (t.rows, t.columns)),
        without_network: matches!(network, Some(wire::NetworkBody::None)),
        reason,
        into: InContainer { pid: None, user: user.map(|u| (u.uid, u.gid)), directory },
        caller,
    })
}

/// Whether the client asks to speak frames. One that asks for something else is told so: it would
/// otherwise wait for a stream while its command runs.
fn wants_stream(version: Version, headers: &HeaderMap) -> Result<bool, Refusal> {
    if !has_word(headers, &CONNECTION, "upgrade") && !headers.contains_key(UPGRADE) {
        return Ok(false);
    }
    let is_whole = has_word(headers, &CONNECTION, "upgrade")
        && has_word(headers, &UPGRADE, wire::UPGRADE)
        && version == Version::HTTP_11;
    if is_whole {
        return Ok(true);
    }
    let message = format!(
        "an upgrade is asked for that is none of this path's: HTTP/1.1 with `Connection: Upgrade` and \
         `Upgrade: {}` is",
        wire::UPGRADE
    );
    Err(Refusal::malformed(message))
}

fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let texts = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
}

async fn to_its_end(exec_id: ExecId, ours: UnixStream) -> Answer {
    let mut ours = tokio::net::UnixStream::from_std(ours).map_err(broken)?;

    let mut told = Told::default();
    let mut unread = Vec::new();
    let mut bytes = vec![0; frames::MAX_PAYLOAD];
    loop {
        // An exec that ends without a look at its input resets the connection, behind its last word.
        let n = ours.read(&mut bytes).await.unwrap_or(0);
        if n == 0 {
            return told.answer(exec_id);
        }
        unread.extend_from_slice(bytes.get(..n).unwrap_or_default());
        let mut taken = 0;
        while let Some((kind, payload, length)) =
            frames::take(unread.get(taken..).unwrap_or_default()).map_err(|_| lost())?
        {
            told.hear(kind, payload);
            taken += length;
        }
        unread.drain(..taken);
    }
}

/// What an exec has said until now.
#[derive(Default)]
struct Told {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    is_truncated: bool,
    exit: Vec<u8>,
    error: Vec<u8>,
}

impl Told {
    fn hear(&mut self, kind: Kind, payload: &[u8]) {
        match kind {
            Kind::Stdout => self.is_truncated |= !append(&mut self.stdout, payload, MOST_OUTPUT),
            Kind::Stderr => self.is_truncated |= !append(&mut self.stderr, payload, MOST_OUTPUT),
            // One JSON text may come in several frames. One that is cut is no JSON any more.
            Kind::Exit => drop(append(&mut self.exit, payload, MOST_WORDS)),
            Kind::Error => drop(append(&mut self.error, payload, MOST_WORDS)),
            Kind::Started | Kind::Stdin | Kind::Signal | Kind::Window => {}
        }
    }

    fn answer(self, exec_id: ExecId) -> Answer {
        if let Ok(ErrorBody { error }) = serde_json::from_slice(&self.error) {
            return Err(Refusal::of_exec(error));
        }
        let report: Value = serde_json::from_slice(&self.exit).map_err(|_| lost())?;
        let number = |name: &str| report.get(name).and_then(Value::as_i64);
        let answer = ExecAnswer {
            exec_id,
            exit_status: number("exit_status").and_then(|n| n.try_into().ok()).ok_or_else(lost)?,
            signal: number("signal").and_then(|n| n.try_into().ok()),
            timed_out: report.get("timed_out").and_then(Value::as_bool).unwrap_or(false),
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
            truncated: self.is_truncated,
            report,
        };
        let json = serde_json::to_vec(&answer)
            .map_err(|e| Refusal::internal(format!("an answer has no JSON: {e}")))?;
        Ok(json_answer(StatusCode::OK, json))
    }
}

/// Appends what fits; says whether all did.
fn append(to: &mut Vec<u8>, payload: &[u8], most: usize) -> bool {
    let room = most.saturating_sub(to.len()).min(payload.len());
    to.extend_from_slice(payload.get(..room).unwrap_or_default());
    room == payload.len()
}

fn broken(error: std::io::Error) -> Refusal {
    Refusal::internal(format!("could not make the exec's stream: {error}"))
}

fn lost() -> Refusal {
    Refusal::internal("the exec was lost before it told its end")
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (n.clone(), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn an_upgrade_is_asked_for_wholly_or_not_at_all() {
        #[track_caller]
        fn check(pairs: &[(HeaderName, &'static str)], expected: Option<bool>) {
            let wanted = wants_stream(Version::HTTP_11, &headers(pairs)).ok();
            assert_eq!(wanted, expected, "{pairs:?}");
        }
        check(&[], Some(false));
        check(&[(CONNECTION, "keep-alive")], Some(false));
        check(&[(CONNECTION, "Upgrade"), (UPGRADE, "sublet-exec")], Some(true));
        check(&[(CONNECTION, "keep-alive, Upgrade"), (UPGRADE, "x, Sublet-Exec")], Some(true));
        check(&[(UPGRADE, "sublet-exec")], None);
        check(&[(CONNECTION, "upgrade")], None);
        check(&[(CONNECTION, "upgrade"), (UPGRADE, "websocket")], None);
        let whole = headers(&[(CONNECTION, "Upgrade"), (UPGRADE, "sublet-exec")]);
        assert!(wants_stream(Version::HTTP_10, &whole).is_err());
    }

    #[tokio::test]
    async fn an_exec_without_an_upgrade_is_told_at_its_end() {
        let (client, ours) = stream_pair().unwrap();
        let mut stream = client.socket;
        let exec = std::thread::spawn(move || {
            use std::io::{Read, Write};
            stream.set_nonblocking(false).unwrap();
            let mut input = [0; frames::HEADER];
            stream.read_exact(&mut input).unwrap();
            assert_eq!((client.greeting, input), (vec![], frames::header(Kind::Stdin, 0)));
            let mut out = Vec::new();
            frames::push(Kind::Started, b"{}", &mut out);
            frames::push(Kind::Stdout, &[b'a'; MOST_OUTPUT + 1], &mut out);
            frames::push(Kind::Stderr, b"b\xff", &mut out);
            frames::push(
                Kind::Exit,
                br#"{"exit_status":3,"signal":null,"timed_out":false}"#,
                &mut out,
            );
            stream.write_all(&out).unwrap();
        });
        let id = ExecId::fresh();
        let response = to_its_end(id.clone(), ours).await.unwrap();
        exec.join().unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        let answer: ExecAnswer = serde_json::from_slice(&bytes).unwrap();
        assert_eq!((answer.exec_id, answer.exit_status, answer.signal), (id, 3, None));
        assert_eq!((answer.stdout.len(), &*answer.stderr), (MOST_OUTPUT, "b\u{fffd}"));
        assert!(answer.truncated && !answer.timed_out);
    }

    #[tokio::test]
    async fn an_exec_that_failed_or_vanished_is_an_error() {
        #[track_caller]
        fn check(refusal: Refusal, status: u16, reason: &str) {
            assert_eq!((refusal.status.as_u16(), &*refusal.reason), (status, reason));
        }
        async fn after(frames: &'static [(Kind, &'static [u8])]) -> Refusal {
            let (client, ours) = stream_pair().unwrap();
            let mut out = Vec::new();
            frames.iter().for_each(|(kind, payload)| frames::push(*kind, payload, &mut out));
            (&client.socket).write_all(&out).unwrap();
            let answering = tokio::spawn(to_its_end(ExecId::fresh(), ours));
            drop(client);
            answering.await.unwrap().unwrap_err()
        }
        const DENIED: &[u8] = br#"{"error":{"stage":"resolve","reason":"source_unavailable","message":"m","hint":""}}"#;
        check(after(&[(Kind::Error, DENIED)]).await, 403, "source_unavailable");
        check(after(&[(Kind::Stdout, b"half")]).await, 500, "internal");
        check(after(&[(Kind::Exit, b"{}")]).await, 500, "internal");
        check(after(&[]).await, 500, "internal");
    }
}
