//! Classic BPF as seccomp(2) takes it: the few instructions that occur here, made and followed.
//!
//! Receives instructions and a call, returns where the call ends. Touches nothing; must never guess:
//! an instruction that it does not know is an error, not a fall-through.

use std::collections::HashMap;

/// One instruction, `struct sock_filter` of linux/filter.h.
pub type Insn = seccompiler::sock_filter;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Offsets in `struct seccomp_data`, linux/seccomp.h.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGS_OFFSET: u32 = 16;

pub fn load_number() -> Insn {
    Insn { code: LOAD, jt: 0, jf: 0, k: NUMBER_OFFSET }
}

pub fn load_arch() -> Insn {
    Insn { code: LOAD, jt: 0, jf: 0, k: ARCH_OFFSET }
}

pub fn ret(action: u32) -> Insn {
    Insn { code: RETURN, jt: 0, jf: 0, k: action }
}

pub fn jump(over: u32) -> Insn {
    Insn { code: JUMP, jt: 0, jf: 0, k: over }
}

pub fn jump_if_equal(value: u32, then: u8, otherwise: u8) -> Insn {
    Insn { code: EQUAL, jt: then, jf: otherwise, k: value }
}

pub fn jump_if_at_least(value: u32, then: u8, otherwise: u8) -> Insn {
    Insn { code: AT_LEAST, jt: then, jf: otherwise, k: value }
}

/// Where execution can go from `insn` at `pc`; `None` for an instruction that is not known.
pub fn successors(insn: &Insn, pc: usize) -> Option<Vec<usize>> {
    let next = pc + 1;
    match insn.code {
        LOAD | AND => Some(vec![next]),
        JUMP => Some(vec![next + insn.k as usize]),
        EQUAL | GREATER | AT_LEAST => {
            Some(vec![next + usize::from(insn.jt), next + usize::from(insn.jf)])
        }
        RETURN => Some(Vec::new()),
        _ => None,
    }
}

/// The same program in fewer instructions: what says the same stands once, and unconditional jumps only where
/// another instruction does not reach. seccompiler begins each rule with two jumps, a search has a leaf for each run
/// of numbers, and the kernel's compiler takes its time for each of them, at every exec.
///
/// # Errors
/// [`Lost`] at an instruction that is not known or leads out of the program.
pub fn share(program: &[Insn]) -> Result<Vec<Insn>, Lost> {
    let (nodes, entry) = graph(program)?;
    Ok(lay_out(&nodes, entry))
}

/// What is done at a place of a program, and at which nodes (by number) it goes on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Node {
    Return {
        action: u32,
    },
    /// A load, or an `and`.
    Step {
        code: u16,
        k: u32,
        next: usize,
    },
    Branch {
        code: u16,
        k: u32,
        then: usize,
        otherwise: usize,
    },
}

/// The distinct nodes, each after those at which it goes on, and the number of the first to be executed.
fn graph(program: &[Insn]) -> Result<(Vec<Node>, usize), Lost> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut numbers: HashMap<Node, usize> = HashMap::new();
    // Every jump goes forward, so that going backwards each target is known.
    let mut number_at: Vec<usize> = vec![0; program.len()];
    for (pc, insn) in program.iter().enumerate().rev() {
        let target = |by: usize| number_at.get(pc + 1 + by).copied().ok_or(Lost(pc));
        let node = match insn.code {
            RETURN => Node::Return { action: insn.k },
            LOAD | AND => Node::Step { code: insn.code, k: insn.k, next: target(0)? },
            JUMP => {
                number_at[pc] = target(insn.k as usize)?;
                continue;
            }
            EQUAL | GREATER | AT_LEAST => {
                let (then, otherwise) = (target(insn.jt.into())?, target(insn.jf.into())?);
                if then == otherwise {
                    number_at[pc] = then;
                    continue;
                }
                Node::Branch { code: insn.code, k: insn.k, then, otherwise }
            }
            _ => return Err(Lost(pc)),
        };
        number_at[pc] = *numbers.entry(node).or_insert_with(|| {
            nodes.push(node);
            nodes.len() - 1
        });
    }
    number_at.first().map(|&entry| (nodes, entry)).ok_or(Lost(0))
}

/// Writes those nodes that can be reached, from the last instruction to the first.
fn lay_out(nodes: &[Node], entry: usize) -> Vec<Insn> {
    let mut is_reached = vec![false; nodes.len()];
    is_reached[entry] = true;
    for number in (0..=entry).rev() {
        if is_reached[number] {
            match nodes[number] {
                Node::Return { .. } => {}
                Node::Step { next, .. } => is_reached[next] = true,
                Node::Branch { then, otherwise, .. } => {
                    is_reached[then] = true;
                    is_reached[otherwise] = true;
                }
            }
        }
    }
    let mut layout = Layout { nodes, reversed: Vec::new(), place: vec![0; nodes.len()] };
    for number in (0..=entry).filter(|&number| is_reached[number]) {
        let insn = match nodes[number] {
            Node::Return { action } => ret(action),
            Node::Step { code, k, next } => {
                layout.bring(next, 0);
                Insn { code, jt: 0, jf: 0, k }
            }
            Node::Branch { code, k, then, otherwise } => {
                // One less: the other may need a stepping stone between.
                layout.bring(then, usize::from(u8::MAX) - 1);
                layout.bring(otherwise, usize::from(u8::MAX));
                let (jt, jf) = (layout.distance(then), layout.distance(otherwise));
                Insn { code, jt: jt as u8, jf: jf as u8, k }
            }
        };
        layout.write(number, insn);
    }
    layout.reversed.reverse();
    layout.reversed
}

struct Layout<'a> {
    nodes: &'a [Node],
    reversed: Vec<Insn>,
    /// By node: how many instructions there are from its nearest place to the end.
    place: Vec<usize>,
}

impl Layout<'_> {
    fn write(&mut self, number: usize, insn: Insn) {
        self.reversed.push(insn);
        self.place[number] = self.reversed.len();
    }

    /// How many instructions the next one to be written has to skip.
    fn distance(&self, number: usize) -> usize {
        self.reversed.len() - self.place[number]
    }

    /// Puts a stepping stone to a node that lies further than `reach`.
    fn bring(&mut self, number: usize, reach: usize) {
        if self.distance(number) > reach {
            let stone = match self.nodes[number] {
                Node::Return { action } => ret(action),
                _ => jump(self.distance(number) as u32),
            };
            self.write(number, stone);
        }
    }
}

/// How a program ends for a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this `SECCOMP_RET_*` value.
    Return(u32),
    /// It looks at an argument, at this instruction, and no arguments were given.
    NeedsArgument(usize),
}

/// The instruction at which a program could not be followed.
#[derive(Debug)]
pub struct Lost(pub usize);

/// Follows `program` for one call, as the kernel would.
///
/// # Errors
/// [`Lost`] at an instruction that is not known or lies outside the program.
pub fn walk(
    program: &[Insn],
    nr: u32,
    arch: u32,
    args: Option<&[u64; 6]>,
) -> Result<Outcome, Lost> {
    let mut a = 0u32;
    let mut pc = 0usize;
    loop {
        let insn = program.get(pc).ok_or(Lost(pc))?;
        let taken = match insn.code {
            LOAD => {
                a = match (insn.k, args) {
                    (NUMBER_OFFSET, _) => nr,
                    (ARCH_OFFSET, _) => arch,
                    (ARGS_OFFSET.., None) => return Ok(Outcome::NeedsArgument(pc)),
                    (offset @ ARGS_OFFSET.., Some(args)) => {
                        half(args, offset - ARGS_OFFSET).ok_or(Lost(pc))?
                    }
                    _ => return Err(Lost(pc)),
                };
                0
            }
            AND => {
                a &= insn.k;
                0
            }
            JUMP => insn.k as usize,
            EQUAL => usize::from(if a == insn.k { insn.jt } else { insn.jf }),
            GREATER => usize::from(if a > insn.k { insn.jt } else { insn.jf }),
            AT_LEAST => usize::from(if a >= insn.k { insn.jt } else { insn.jf }),
            RETURN => return Ok(Outcome::Return(insn.k)),
            _ => return Err(Lost(pc)),
        };
        pc += 1 + taken;
    }
}

/// The 32-bit half of the arguments at this byte offset; little-endian, so the low half comes first.
fn half(args: &[u64; 6], offset: u32) -> Option<u32> {
    let argument = args.get((offset / 8) as usize)?;
    match offset % 8 {
        0 => Some(*argument as u32),
        4 => Some((*argument >> 32) as u32),
        _ => None,
    }
}
