package netstack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// dnsPayload is the size of a UDP answer that we ask for: what passes any path
// unfragmented (DNS flag day 2020, the default of the large servers).
const dnsPayload = 1232

// A dnsAnswer is what a message says about one question.
type dnsAnswer struct {
	rcode     dnsmessage.RCode
	truncated bool
	negative  bool          // no such name, or nothing of that type
	addrs     []netip.Addr  // of the name or of what its CNAMEs lead to
	ttl       time.Duration // for how long the message holds; 0: not to be kept
}

// final tells whether another server need not be asked: the name is known, or known not to
// exist.
func (a *dnsAnswer) final() bool {
	return a.rcode == dnsmessage.RCodeSuccess || a.rcode == dnsmessage.RCodeNameError
}

var errNotTheAnswer = errors.New("not an answer to the question")

// newQuestion makes the question for a canonical name that isName approves of.
func newQuestion(name string, t dnsmessage.Type) (dnsmessage.Question, error) {
	n, err := dnsmessage.NewName(name + ".")
	return dnsmessage.Question{Name: n, Type: t, Class: dnsmessage.ClassINET}, err
}

// packQuery makes a query with recursion desired and room for larger answers (EDNS, RFC
// 6891).
func packQuery(id uint16, q dnsmessage.Question) ([]byte, error) {
	b := dnsmessage.NewBuilder(make([]byte, 0, 512), dnsmessage.Header{ID: id, RecursionDesired: true})
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if err := b.StartAdditionals(); err != nil {
		return nil, err
	}
	var opt dnsmessage.ResourceHeader
	if err := opt.SetEDNS0(dnsPayload, dnsmessage.RCodeSuccess, false); err != nil {
		return nil, err
	}
	if err := b.OPTResource(opt, dnsmessage.OPTResource{}); err != nil {
		return nil, err
	}
	return b.Finish()
}

// readQuery reads the question of a query.
func readQuery(msg []byte) (h dnsmessage.Header, q dnsmessage.Question, err error) {
	var p dnsmessage.Parser
	if h, err = p.Start(msg); err != nil {
		return h, q, err
	}
	q, err = p.Question()
	return h, q, err
}

// packFailure answers a query with "server failure" (RFC 1035 4.1.1).
func packFailure(id uint16, q dnsmessage.Question) ([]byte, error) {
	h := dnsmessage.Header{ID: id, Response: true, RecursionDesired: true, RecursionAvailable: true, RCode: dnsmessage.RCodeServerFailure}
	b := dnsmessage.NewBuilder(nil, h)
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	return b.Finish()
}

// readAnswer checks that msg answers q under id, and reads it. It borrows msg.
func readAnswer(msg []byte, id uint16, q dnsmessage.Question) (a dnsAnswer, err error) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil {
		return a, err
	}
	if !h.Response || h.ID != id {
		return a, errNotTheAnswer
	}
	asked, err := p.AllQuestions()
	if err != nil {
		return a, err
	}
	if len(asked) != 1 || asked[0].Type != q.Type || asked[0].Class != q.Class || !sameName(asked[0].Name, q.Name) {
		return a, errNotTheAnswer
	}
	a.rcode, a.truncated = h.RCode, h.Truncated
	if a.truncated {
		return a, nil // the rest may be cut anywhere
	}
	found, answerTTL, err := a.readRecords(&p, q)
	if err != nil || !a.final() {
		return a, err
	}
	a.ttl, a.negative = answerTTL, !found
	if a.negative { // as long as the zone's SOA says
		soa, ok, err := readSOA(&p)
		if err != nil {
			return a, err
		}
		if !ok {
			soa = 0
		}
		if answerTTL >= 0 {
			soa = min(soa, answerTTL)
		}
		a.ttl = soa
	}
	return a, nil
}

// readRecords reads the answer section. found tells whether it has what was asked for, ttl is
// the smallest in it, -1 if it is empty.
func (a *dnsAnswer) readRecords(p *dnsmessage.Parser, q dnsmessage.Question) (found bool, ttl time.Duration, err error) {
	ttl = -1
	name := q.Name // moves along the CNAMEs, which stand in order (RFC 1034 4.3.2)
	for {
		h, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return found, ttl, nil
		}
		if err != nil {
			return found, ttl, err
		}
		if t := seconds(h.TTL); ttl < 0 || t < ttl {
			ttl = t
		}
		ours := h.Class == dnsmessage.ClassINET && sameName(h.Name, name)
		switch {
		case ours && h.Type == q.Type && h.Type == dnsmessage.TypeA:
			r, err := p.AResource()
			if err != nil {
				return found, ttl, err
			}
			a.addrs = append(a.addrs, netip.AddrFrom4(r.A))
			found = true
		case ours && h.Type == q.Type && h.Type == dnsmessage.TypeAAAA:
			r, err := p.AAAAResource()
			if err != nil {
				return found, ttl, err
			}
			// An IPv4 address in disguise is none of IPv6.
			if addr := netip.AddrFrom16(r.AAAA); !addr.Is4In6() {
				a.addrs = append(a.addrs, addr)
				found = true
			}
		case ours && h.Type == dnsmessage.TypeCNAME && q.Type != dnsmessage.TypeCNAME:
			r, err := p.CNAMEResource()
			if err != nil {
				return found, ttl, err
			}
			name = r.CNAME
		default:
			found = found || ours && h.Type == q.Type
			if err := p.SkipAnswer(); err != nil {
				return found, ttl, err
			}
		}
	}
}

// readSOA reads for how long a negative answer holds (RFC 2308 5).
func readSOA(p *dnsmessage.Parser) (ttl time.Duration, ok bool, err error) {
	for {
		h, err := p.AuthorityHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return 0, false, nil
		}
		if err != nil {
			return 0, false, err
		}
		if h.Type != dnsmessage.TypeSOA {
			if err := p.SkipAuthority(); err != nil {
				return 0, false, err
			}
			continue
		}
		r, err := p.SOAResource()
		if err != nil {
			return 0, false, err
		}
		return min(seconds(h.TTL), seconds(r.MinTTL)), true, nil
	}
}

// seconds converts a TTL; one with the top bit set is zero (RFC 2181 8).
func seconds(ttl uint32) time.Duration {
	if ttl > 1<<31-1 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}

func sameName(a, b dnsmessage.Name) bool {
	return strings.EqualFold(string(a.Data[:a.Length]), string(b.Data[:b.Length]))
}

// setID overwrites the ID of a message.
func setID(msg []byte, id uint16) { binary.BigEndian.PutUint16(msg, id) }
