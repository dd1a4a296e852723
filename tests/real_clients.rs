//! Real programs that take a credential the way they take it everywhere: curl, psql, a memfd reader,
//! ssh-keygen and openssl.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Command;

use support::postgres::Postgres;
use support::world::finish;
use support::{World, needs};

/// An HTTP service that answers only to one bearer token.
fn bearer_service(token: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let reader = BufReader::new(stream.try_clone().unwrap());
            let admitted =
                reader.lines().map_while(Result::ok).take_while(|line| !line.is_empty()).any(
                    |line| line.eq_ignore_ascii_case(&format!("authorization: bearer {token}")),
                );
            let reply = if admitted {
                "200 OK\r\nContent-Length: 8\r\n\r\nwelcome\n"
            } else {
                "401 No\r\nContent-Length: 0\r\n\r\n"
            };
            let _ = write!(stream, "HTTP/1.1 {reply}");
        }
    });
    port
}

/// The leasing profile on the host's network.
fn on_network(world: &World, value: &[u8]) -> String {
    let profile = world.leasing_with(value, "default", "redact = true");
    let toml = fs::read_to_string(&profile).unwrap();
    world.profile(
        "leasing-net",
        &toml.replace("[[capability]]\n", "[network]\nmode = \"host\"\n[[capability]]\n"),
    )
}

#[test]
fn curl_with_a_bearer_token_by_env() {
    needs("curl", "curl");
    const TOKEN: &str = "bearer-of-good-news-123";
    let port = bearer_service(TOKEN);
    for world in World::each() {
        let profile = on_network(&world, TOKEN.as_bytes());
        // By configuration on standard input, so that it is not in curl's arguments.
        let script = format!(
            "printf 'header = \"Authorization: Bearer %s\"\\n' \"$TOKEN\" | curl -sfK - http://127.0.0.1:{port}/"
        );
        world.leased_sh(&profile, &["env"], &script).ok().prints("welcome\n");
        world.sh(&profile, &script).exits(22);
    }
}

#[test]
fn psql_with_a_passfile_by_file() {
    needs("psql", "postgresql-client");
    let postgres = Postgres::start("a-database-password");
    let passfile = format!("127.0.0.1:{}:*:admin:a-database-password\n", postgres.port);
    for world in World::each() {
        let profile = on_network(&world, passfile.as_bytes());
        let query = format!(
            "PGPASSFILE=$TOKEN_FILE psql -w -h 127.0.0.1 -p {} -U admin -d postgres -Atc 'select 40+2'",
            postgres.port
        );
        world.leased_sh(&profile, &["file"], &query).ok().prints("42\n");
        world.sh(&profile, &query).exits(2);
    }
}

#[test]
fn a_program_that_reads_a_memfd() {
    for world in World::each() {
        let profile = world.leasing(b"read through a descriptor");
        let reader = "import os, hashlib\n\
             fd = int(os.environ['TOKEN_FD'])\n\
             print(hashlib.sha256(os.pread(fd, 1 << 20, 0)).hexdigest())";
        let outcome = world
            .run(&[
                "--profile",
                &profile,
                "--lease",
                "test.use@svc.test",
                "--",
                "python3",
                "-c",
                reader,
            ])
            .ok();
        use sha2::Digest;
        let digest = sha2::Sha256::digest(b"read through a descriptor");
        let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(outcome.line(), hex);
    }
}

#[test]
fn ssh_keygen_signs_with_a_private_key_by_file() {
    needs("ssh-keygen", "openssh-client");
    for world in World::each() {
        let key = world.path("home/id");
        let mut make = Command::new("ssh-keygen");
        make.args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"]).arg(&key);
        finish(make, b"", None).ok();
        let private = fs::read(&key).unwrap();
        fs::remove_file(&key).unwrap();
        let profile = world.leasing(&private);
        world.file("message", "signed inside", 0o644);
        world
            .leased_sh(
                &profile,
                &["file"],
                "ssh-keygen -q -Y sign -n file -f \"$TOKEN_FILE\" message",
            )
            .ok();
        let mut check = Command::new("ssh-keygen");
        check.args(["-Y", "check-novalidate", "-n", "file", "-s"]);
        check.arg(world.workspace.join("message.sig"));
        finish(check, b"signed inside", None).ok();
        world.holds_nowhere(private.split(|b| *b == b'\n').nth(2).unwrap());
    }
}

#[test]
fn openssl_signs_with_a_private_key_by_file() {
    needs("openssl", "openssl");
    for world in World::each() {
        let make = |args: &[&str], stdin: &[u8]| {
            let mut command = Command::new("openssl");
            command.args(args);
            finish(command, stdin, None).ok().stdout
        };
        let private =
            make(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"], b"");
        let public = world.path("home/public.pem");
        fs::write(&public, make(&["pkey", "-pubout"], &private)).unwrap();
        let profile = world.leasing(&private);
        world.file("message", "signed inside", 0o644);
        world
            .leased_sh(
                &profile,
                &["file"],
                "openssl dgst -sha256 -sign \"$TOKEN_FILE\" -out message.sig message",
            )
            .ok();
        let at = |name: &str| world.workspace.join(name).to_str().unwrap().to_owned();
        make(
            &[
                "dgst",
                "-sha256",
                "-verify",
                public.to_str().unwrap(),
                "-signature",
                &at("message.sig"),
                &at("message"),
            ],
            b"",
        );
    }
}
