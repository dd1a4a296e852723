//! Whom a minter trusts: a certificate that the configured authority signed for that host, and no other.
#![forbid(unsafe_code)]

mod support;

use std::process::Command;

use support::World;
use support::servers::Server;
use support::world::leasing_profile;

/// An authority, and a certificate of its for `name`.
fn certificate(world: &World, label: &str, name: &str) -> [String; 3] {
    support::needs("openssl", "openssl");
    let path = |kind: &str| world.path(&format!("{label}.{kind}")).display().to_string();
    let run = |args: &[&str]| {
        let ended = Command::new("openssl").args(args).output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    };
    let (ca, ca_key) = (path("ca.crt"), path("ca.key"));
    let (key, request, crt, more) = (path("key"), path("csr"), path("crt"), path("ext"));
    let new = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj"];
    run(&[&["req", "-x509", "-keyout", &ca_key, "-out", &ca], &new[..], &["/CN=test authority"]]
        .concat());
    run(&[
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=server",
        "-keyout",
        &key,
        "-out",
        &request,
    ]);
    std::fs::write(&more, format!("subjectAltName={name}\n")).unwrap();
    run(&[
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        &more,
        "-out",
        &crt,
    ]);
    [ca, crt, key]
}

fn leased(world: &World, url: &str, ca: Option<&str>) -> support::Outcome {
    let ca = ca.map(|ca| format!("ca_file = \"{ca}\"\n")).unwrap_or_default();
    world.configure(&format!(
        "[secrets.client]\nsource = \"vault\"\nallow = []\n\
         [secrets.s]\nsource = \"oauth\"\ntoken_url = \"{url}\"\nclient_id = \"a\"\n\
         client_secret = \"client\"\nallow = [\"test.use@svc.test\"]\n{ca}",
    ));
    world.set_secret("client", b"client-secret-0123456789");
    let profile = world.profile("leasing", &leasing_profile("default", ""));
    world.leased_sh(&profile, &["env"], "echo ${#TOKEN}")
}

#[test]
fn only_what_the_named_authority_signed_for_this_host_is_trusted() {
    let world = World::host();
    let [ca, crt, key] = certificate(&world, "right", "IP:127.0.0.1,DNS:localhost");
    let server = Server::script("tls.py", &[&crt, &key]);
    let (by_address, by_name) = (
        format!("https://127.0.0.1:{}/token", server.port),
        format!("https://localhost:{}/token", server.port),
    );
    leased(&world, &by_address, Some(&ca)).ok().prints("25\n");
    leased(&world, &by_name, Some(&ca)).ok().prints("25\n");

    // The system's own authorities did not sign it, nor did another.
    let untrusted = "its certificate is not one that this host trusts";
    let outcome = leased(&world, &by_address, None).denied("source_unavailable");
    assert!(outcome.err().contains(untrusted), "{outcome}");
    let [other, ..] = certificate(&world, "other", "IP:127.0.0.1");
    let outcome = leased(&world, &by_address, Some(&other)).denied("source_unavailable");
    assert!(outcome.err().contains(untrusted), "{outcome}");

    // It is another host's.
    let [ca, crt, key] = certificate(&world, "wrong", "DNS:other.test");
    let wrong = Server::script("tls.py", &[&crt, &key]);
    let url = format!("https://127.0.0.1:{}/token", wrong.port);
    let outcome = leased(&world, &url, Some(&ca)).denied("source_unavailable");
    assert!(outcome.err().contains(untrusted), "{outcome}");

    // No TLS where TLS is expected; no authorities in the file.
    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/token", plain.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in plain.incoming().flatten() {
            use std::io::{Read, Write};
            let mut hello = [0; 4096];
            drop(stream.read(&mut hello));
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"));
        }
    });
    let outcome = leased(&world, &url, Some(&ca)).denied("source_unavailable");
    assert!(outcome.err().contains("no TLS session could be made"), "{outcome}");
    let outcome = leased(&world, &by_address, Some(&key)).denied("source_unavailable");
    assert!(outcome.err().contains("certificates to trust could not be read"), "{outcome}");
}
