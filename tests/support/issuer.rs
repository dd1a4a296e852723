//! `sublet issuer serve` for one test, at an address of its own.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Stdio};

use super::world::World;

pub struct Issuer {
    child: Child,
    pub url: String,
}

impl Issuer {
    /// Makes this world an issuer at a free port of loopback, and serves its documents there.
    pub fn serve(world: &World) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let url = format!("http://127.0.0.1:{port}");
        world.call(&["issuer", "init", "--url", &url]).ok();
        let mut serve = world.sublet();
        serve.args(["--json", "issuer", "serve", "--listen", url.trim_start_matches("http://")]);
        let mut child = serve.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("listening"), "{line}");
        Self { child, url }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        // Ours and not yet reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
