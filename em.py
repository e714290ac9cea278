import torch, sys
torch.manual_seed(0); torch.set_num_threads(1)
B,T,H,K,V,C=1,512,2,128,128,32
def r(x, on=True): return x.bfloat16().float() if on else x
q,k,v,do=(torch.randn(B,T,H,n).bfloat16().float() for n in (K,K,V,V))
g=(torch.nn.functional.logsigmoid(torch.randn(B,T,H,K)).bfloat16()/2).float()
scale=K**-.5
sys.path.insert(0,"/work/main")
from kernel import chunked_scan
D=[x.double().requires_grad_() for x in (q,k,v,g)]
o,_=chunked_scan(*D,scale=scale,backend="torch"); G=torch.autograd.grad(o,D,do.double())
ref=[o.detach(),*G]
def emu(A_ops, A_store, qk, S_r, fin, out=True, sc=True):
    ch=lambda x:x.unflatten(1,(-1,C)).transpose(2,3)   # B N H C d
    Q,Kk,Vv,gg,dO=map(ch,(q,k,v,g,do))
    N=Q.shape[1]
    i=torch.arange(C); I,J=i[:,None],i[None]
    P=gg.cumsum(-2); R=gg.sum(-2,keepdim=True)-P
    def levels():
        right=(i//8%2==1)
        own=((I//8==J//8)&((J<=I)==right[:,None])).float()
        near=own@gg.clamp(min=-7); near=torch.where(right[:,None],near,-near)
        yield near.exp(),(-near).exp(),((I//16==J//16)&(I>=J)).float()
        right=(i//16%2==1)
        own=((I//16==J//16)&((J<=I)==right[:,None])).float()
        f=(own@gg).exp(); yield f,f,(right[:,None]&(I//16==J//16+1)).float()
    A=sum(p*(r(Q*u,A_ops)@r(Kk*d,A_ops).mT) for u,d,p in levels())
    qs,ks=r(Q*P.exp(),qk),r(Kk*R.exp(),qk)
    A=r(A,A_store)
    tot=P[...,-1,:].exp()
    def scan(Qa,Ka,Va,Aa,rev,side,end=False):
        S=torch.zeros(B,H,Ka.shape[-1],Va.shape[-1]); outs=[None]*N; marks=[None]*N
        for n in (range(N-1,-1,-1) if rev else range(N)):
            marks[n]=S
            o_=scale*(Qa[:,n]@r(S,S_r))
            if Aa is not None: o_=o_+scale*((Aa[:,n].mT if rev else Aa[:,n])@Va[:,n])
            outs[n]=o_
            dec=tot[:,n]
            S=(dec[...,None] if side=="key" else dec[...,None,:])*S+Ka[:,n].mT@Va[:,n]
        return torch.stack(outs,1),torch.stack(marks,1)
    o_,_=scan(qs,ks,Vv,A,False,"key")
    dv,_=scan(ks,qs,dO,A,True,"key")
    dq,m0=scan(dO,Vv,ks,None,False,"value")
    dk,m1=scan(Vv,dO,qs,None,True,"value")
    W=scale*tot*(r(m0,S_r)*m1).sum(-2)
    dA=scale*(dO@Vv.mT)
    dq=dq*P.exp(); dk=dk*R.exp()
    SdS=W+(Kk*dk).sum(-2)
    for u,d,p in levels():
        a=r(dA*p,fin)
        dq=dq+u*(a@r(Kk*d,fin)); dk=dk+d*(a.mT@r(Q*u,fin))
    x=Q*dq-Kk*dk
    dg=(J>=I).float()@r(x,sc)+SdS[...,None,:]
    un=lambda x:x.transpose(2,3).flatten(1,2)
    res=[un(x) for x in (o_,dq,dk,dv,dg)]
    return [((r(x,out).double()-y).norm()/y.norm()).item() for x,y in zip(res,ref)]
for name,a in {"all bf16":(1,1,1,1,1),"A ops exact":(0,1,1,1,1),"A ops+fin exact":(0,1,1,1,0),"A ops, store, fin exact":(0,0,1,1,0),"qs ks exact":(1,1,0,1,1),"S exact":(1,1,1,0,1),"fin exact":(1,1,1,1,0),"all but S":(0,0,0,1,0),"all exact":(0,0,0,0,0)}.items():
    print(f"{name:26s}"+" ".join(f"{x:.1e}" for x in emu(*a)), flush=True)
print("sums of x exact, all bf16  "+" ".join(f"{x:.1e}" for x in emu(1,1,1,1,1,sc=False)))
print("sums of x exact, fin exact "+" ".join(f"{x:.1e}" for x in emu(1,1,1,1,0,sc=False)))
print("sums of x exact, A fin exact "+" ".join(f"{x:.1e}" for x in emu(0,0,1,1,0,sc=False)))
print("sums exact, all exact"+" ".join(f"{x:.1e}" for x in emu(0,0,0,0,0,sc=False)))
