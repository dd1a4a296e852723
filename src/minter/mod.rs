//! The minter: one process for one question to a source that mints. The only part of sublet that speaks to
//! the network.
//!
//! Receives, as descriptors of the launcher's making: the source's settings, which root configured; the
//! broker's request, with the credentials; room for the answer. Returns nothing but that answer: a value with
//! what is known of it, or a failure in words of ours. May touch the certificates to trust, what name
//! resolution reads, and the hosts that the settings name. Must never say anything elsewhere, follow a
//! redirect, or put what a far side said into a failure.
//!
//! - [`walls`]: what it gives up, before it reads what the broker wrote
//! - `http`: one call over a connection of its own; `tls`: whom it trusts
//! - `fill`: placeholders of the configuration
//! - `oauth`, `github`, `vault_server`, `aws`, `postgres`: a kind of source a file; `jws`: RS256
#![forbid(unsafe_code)]

mod aws;
mod fill;
mod github;
mod http;
mod jws;
mod oauth;
mod postgres;
mod tls;
mod vault_server;
pub mod walls;

use std::fs::File;
use std::io::{self, Read, Write};

use crate::config::{MintKind, Settings};
use crate::model::mint::{
    self, About, Facts, Failure, Fault, Fresh, MAX_REPLY, MAX_REQUEST, Part, Reply, Request,
};
use crate::sys::{memory, process, wiping};
use http::Http;

/// As the launcher numbers them.
const REQUEST: i32 = 0;
const REPLY: i32 = 1;
const SETTINGS: i32 = 3;

#[derive(Debug, thiserror::Error)]
#[error("this is no minter's process: {what}")]
pub struct NoMinter {
    what: &'static str,
    source: io::Error,
}

/// What came of it, in memory of its own.
enum Outcome {
    Minted(Minted),
    /// The far side lets it live longer.
    Renewed(About),
    Revoked,
}

/// A value, and what is known of it.
struct Minted {
    value: Vec<u8>,
    /// Name, whether it is secret, and the part itself.
    parts: Vec<(&'static str, bool, Vec<u8>)>,
    about: About,
    handle: Option<Vec<u8>>,
}

/// Answers the one question, and returns. The status says only whether there is an answer.
///
/// # Errors
/// The descriptors are not those that the launcher gives.
pub fn run() -> Result<(), NoMinter> {
    let failed = |what| move |source| NoMinter { what, source };
    wiping::wipe_what_is_freed();
    memory::set_dumpable(false).map_err(failed("it cannot become undumpable"))?;
    let open = |number| process::copy_of_descriptor(number).map(File::from);
    let settings = open(SETTINGS).map_err(failed("it was given no settings"))?;
    let request = open(REQUEST).map_err(failed("it was given no request"))?;
    let mut reply = open(REPLY).map_err(failed("it was given no room for an answer"))?;
    // Memory alone: a terminal, or a pipe that nobody ends, is none of the launcher's.
    for file in [&settings, &request, &reply] {
        rustix::fs::fcntl_get_seals(file)
            .map_err(|e| failed("what it was given is no memory")(e.into()))?;
    }
    let settings = contents(settings, 64 << 10).map_err(failed("its settings cannot be read"))?;
    let outcome = mint::read::<Settings>(&settings)
        .map_err(|_| Failure::of(Fault::Settings))
        .and_then(|settings| answer(&settings, request));
    let mut room = vec![0; MAX_REPLY];
    if lay(&outcome, &mut room).is_err() {
        room.fill(0);
        mint::lay(&Reply::Failed(Failure::of(Fault::TooLarge)), &mut room)
            .map_err(|e| failed("its answer does not fit")(io::Error::other(e)))?;
    }
    reply.write_all(&room).map_err(failed("its answer cannot be written"))
}

fn lay(outcome: &Result<Outcome, Failure>, room: &mut [u8]) -> Result<(), mint::Malformed> {
    let reply = match outcome {
        Err(failure) => Reply::Failed(failure.clone()),
        Ok(Outcome::Revoked) => Reply::Revoked,
        Ok(Outcome::Renewed(about)) => Reply::Renewed(about.clone()),
        Ok(Outcome::Minted(minted)) => Reply::Minted(Fresh {
            value: &minted.value,
            parts: minted
                .parts
                .iter()
                .map(|(name, is_secret, value)| Part {
                    name: (*name).to_owned(),
                    is_secret: *is_secret,
                    value,
                })
                .collect(),
            about: minted.about.clone(),
            handle: minted.handle.as_deref(),
        }),
    };
    mint::lay(&reply, room)
}

/// From the start: the position of a memfd is its holders' in common.
fn contents(mut file: File, most: usize) -> io::Result<Vec<u8>> {
    io::Seek::rewind(&mut file)?;
    let mut bytes = Vec::new();
    file.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn answer(settings: &Settings, request: File) -> Result<Outcome, Failure> {
    let source = &settings.source;
    // Opened while it can be; read as somebody else's text only behind the walls.
    let trusted = tls::read(source.ca_file.as_deref())?;
    walls::raise(settings)?;
    let request = contents(request, MAX_REQUEST).map_err(|_| Failure::of(Fault::Minter))?;
    let request: Request<'_> = mint::read(&request).map_err(|_| Failure::of(Fault::Minter))?;
    let http = Http::new(source, trusted, &request.facts)?;
    match &source.kind {
        MintKind::OAuth(oauth) => oauth::answer(oauth, &http, &request),
        MintKind::PostgresRole(role) => postgres::answer(role, &http, &request),
        MintKind::GithubApp(app) => github::answer(app, &http, &request),
        MintKind::VaultServer(server) => vault_server::answer(server, &http, &request),
        MintKind::AwsSts(sts) => aws::answer(sts, &http, &request),
    }
}

/// What a revocation or a renewal is about.
fn handle<'a>(request: &Request<'a>) -> Result<&'a [u8], Failure> {
    request.handle.ok_or(Failure::of(Fault::Minter))
}

/// A text for the trail: short, one line, nothing that a terminal would obey.
fn words(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(mint::MAX_WORDS).collect()
}

/// Milliseconds since 1970, so many seconds from when the request was made.
fn seconds_from(facts: &Facts, seconds: i64) -> i64 {
    facts.now.saturating_add(seconds).saturating_mul(1000)
}
